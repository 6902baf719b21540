"""The first sample of a file, token by token: text, id, whether it is supervised, and the loss there.

python3 -m tests.tools.one_sample --model_path output_dir/demo/Baichuan2-tiny --test_path output_dir/demo/train.json
"""

import argparse
from itertools import islice

import torch

import utils
from support.dialogues.samples import read_samples
from support.errors import entry_point
from support.model.directory import ModelDirectory


@entry_point
@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", required=True, help="directory of a model")
    parser.add_argument("--test_path", required=True, help="file of samples, as data_helper.py writes it")
    args = parser.parse_args(argv)

    directory = ModelDirectory(args.model_path)
    tokenizer, model = directory.tokenizer, directory.load(torch.float32)
    samples = islice(read_samples(args.test_path), 1)
    data = utils.RoleDataset(samples, tokenizer, max_len=512, max_src_len=256)
    (batch,) = utils.Collator(data, packing="none", max_pack_len=512, rows_per_batch=1)([0])
    ids = batch["input_ids"][0].tolist()
    columns, labels = batch["loss_positions"].unbind(-1)
    logits = model(input_ids=batch["input_ids"]).logits[0].float()
    losses = torch.nn.functional.cross_entropy(logits[columns], labels, reduction="none")
    loss_of = dict(zip((columns + 1).tolist(), losses.tolist()))  # a token is predicted one column before

    persona = len(data.personas[0])
    print("column    id  token            supervised    loss")
    for column, id in enumerate([*ids, data.eos]):
        if 3 <= column < persona - 2:
            if column == 3:
                print("    …         the rest of the persona")
            continue
        token = repr(tokenizer.convert_ids_to_tokens(id))[1:-1]
        width = 16 - sum(ord(letter) > 0x2E80 for letter in token)  # Chinese characters are two columns wide
        mark, loss = ("yes", f"{loss_of[column]:8.3f}") if column in loss_of else ("no", "")
        print(f"{column:5} {id:6}  {token:{width}} {mark:10}{loss}".rstrip())
    print(f"the loss of the sample is the mean of these {len(labels)}: {losses.mean():.3f}")


if __name__ == "__main__":
    main()
