"""A small stand-in for Baichuan2-7B-Chat, so that everything here runs without a GPU or a download.

    python3 -m support.model.stand_in --save_dir Baichuan2-tiny --train_path data/train.json

The checkpoint has Baichuan2's own layout: a SentencePiece tokenizer with the turn markers at 195 and 196, the same
tensors under the same names, the same JSON files. It is pre-trained on the single sentences of the data, never on which
answer belongs to which question: that is left for train.py to teach.
"""

import math
import os
import random
import re
from io import BytesIO

from support.command_line import ArgumentParser, integer
from support.dialogues.samples import read_samples
from support.errors import blaming, entry_point, slow_imports
from support.files import whole_directory, writing

# As in the published tokenizer: ids 3 to 88 are symbols that text may contain, 89 + n is <reserved_n>.
SYMBOLS = "\n\t，。！？、：；《》【】『』（）“”‘’…—～·+-=.!?,:;()[]{}@#$%^&*_|/~'\"0123456789０１２３４５６７８９"
FIRST_RESERVED = 89
USER_TOKEN_ID, ASSISTANT_TOKEN_ID = 195, 196


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--save_dir", default="Baichuan2-tiny", help="directory of the new checkpoint")
    add("--train_path", default="data/train.json", help="samples to take the sentences from")
    add("--vocab_size", type=integer(1), default=2500, help="pieces of the tokenizer")
    add("--hidden_size", type=integer(1), default=128, help="width of the model")
    add("--num_hidden_layers", type=integer(1), default=4, help="layers of the model")
    add("--steps", type=integer(0), default=300, help="pre-training steps; 0 leaves the weights random")
    add("--batch_size", type=integer(1), default=32, help="sentences a pre-training step")
    add("--seed", type=integer(0), default=1234, help="seed of the weights and of the order of sentences")
    return parser.parse_args(argv)


# After the arguments, since these take seconds.
with slow_imports(parse_args, __name__):
    import sentencepiece
    import torch
    import transformers
    from torch.nn.utils.rnn import pad_sequence
    from tqdm import trange
    from transformers import GenerationConfig, set_seed

    from baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer


def read_sentences(train_path: str) -> list[str]:
    """The sentences of personas, questions and answers, each by itself, without repetition. Raises: UserError."""
    samples = list(read_samples(train_path))
    personas = "\n".join(dict.fromkeys(sample["system"] for sample in samples))
    texts = [message["content"] for sample in samples for message in sample["messages"]]
    sentences = re.findall(r"[^。\n]+。?\n?", personas)  # whole, they would be several times as long as all else
    return list(dict.fromkeys(sentences + texts))


def train_tokenizer(sentences: list[str], vocab_size: int) -> bytes:
    """A SentencePiece model like the published one: BPE, byte fallback, identity normalisation, no dummy prefix."""
    symbols = list(dict.fromkeys(SYMBOLS))[: FIRST_RESERVED - 3]
    symbols += [f"<reserved_{1000 + n}>" for n in range(FIRST_RESERVED - 3 - len(symbols))]
    symbols += [f"<reserved_{n}>" for n in range(ASSISTANT_TOKEN_ID + 1 - FIRST_RESERVED)]
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.9998,
        byte_fallback=True,
        required_chars="▁",  # a space, which few Chinese sentences have
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=symbols,
        max_sentence_length=100_000,
        minloglevel=1,
    )
    return model.getvalue()


def sentence_batches(tokenizer, sentences: list[str], batch_size: int, seed: int):
    """Endless (b, l) batches of single sentences, each after one of the markers or after none, and closed by eos."""
    draw = random.Random(seed)
    ids = [[*line, tokenizer.eos_token_id] for line in tokenizer.text_to_ids(sentences)]
    openings = ([USER_TOKEN_ID], [ASSISTANT_TOKEN_ID], [])
    while True:
        for start in range(0, len(ids) - batch_size + 1, batch_size):
            if start == 0:
                draw.shuffle(ids)
            rows = [torch.tensor(draw.choice(openings) + line[:256]) for line in ids[start : start + batch_size]]
            labels = pad_sequence(rows, batch_first=True, padding_value=-100)
            yield labels.clamp_min(0), labels


def pretrain(model, tokenizer, sentences: list[str], steps: int, batch_size: int, seed: int):
    batches = sentence_batches(tokenizer, sentences, min(batch_size, len(sentences)), seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps + 1)
    model.train()
    with trange(steps, desc="pre-training", unit="step", disable=None) as progress:
        for _ in progress:
            input_ids, labels = next(batches)
            loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.2f}")
    model.eval()


@entry_point
def main(argv=None):
    args = parse_args(argv)
    # Saving imports DeepSpeed, which warns of a machine without a GPU unless it is told.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    set_seed(args.seed)
    sentences = read_sentences(args.train_path)
    with whole_directory(args.save_dir) as directory:
        vocab_file = directory / "tokenizer.model"
        with blaming(f"--vocab_size {args.vocab_size}"):  # larger than the text has pieces, and the like
            vocab_file.write_bytes(train_tokenizer(sentences, args.vocab_size))
        markers = {"user_token_id": USER_TOKEN_ID, "assistant_token_id": ASSISTANT_TOKEN_ID}
        tokenizer = BaichuanTokenizer(str(vocab_file), model_max_length=4096, **markers)
        with blaming("--hidden_size, --num_hidden_layers"):
            config = BaichuanConfig(
                vocab_size=len(tokenizer),
                hidden_size=args.hidden_size,
                intermediate_size=64 * math.ceil(args.hidden_size * 11 / (4 * 64)),  # a multiple of 64 for 4 bits
                num_hidden_layers=args.num_hidden_layers,
                num_attention_heads=max(1, args.hidden_size // 32),
                stand_in=f"a stand-in of {args.num_hidden_layers} layers, which knows only the sentences of {args.train_path}",
            )
        model = BaichuanForCausalLM(config)
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **markers}
        sampling = {"do_sample": True, "temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05}
        model.generation_config = GenerationConfig(**ids, **sampling, max_new_tokens=256)
        if args.steps:
            pretrain(model, tokenizer, sentences, args.steps, args.batch_size, args.seed)
        transformers.logging.disable_progress_bar()  # over some tensors it shows nothing
        with writing(args.save_dir):
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    made = f"{model.num_parameters():,} parameters, {len(tokenizer):,} pieces, {len(sentences):,} sentences"
    print(f"{args.save_dir}: {made}")


if __name__ == "__main__":
    main()
