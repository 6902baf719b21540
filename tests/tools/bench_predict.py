"""Answers a second, by predict.py's way and by transformers' `generate`.

    python3 tests/tools/bench_predict.py --model_path Baichuan2-tiny

The two take turns, and medians of three rounds are compared. Where other programs share the cores, the processor time
says more than the clock.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from baichuan.generation_utils import messages_to_ids
from support.command_line import ArgumentParser
from support.device import pick_device
from support.dialogues.samples import conversation, first_question, read_samples
from support.model.answering import answer_batch, greedy, left_padded
from support.model.directory import ModelDirectory

BATCH_SIZES, ROUNDS = (16, 64), 3


def distinct_prompts(test_path) -> list[list[dict]]:
    """The first question of each sample, as messages; none twice."""
    asked = [(sample["system"], first_question(sample["messages"])) for sample in read_samples(test_path)]
    return [conversation(system, question) for system, question in dict.fromkeys(asked)]


def by_generate(model, tokenizer, conversations: list[list[dict]], config) -> list[str]:
    """Personas are read for every question, and a batch keeps its rows to its end."""
    prompts = [messages_to_ids(tokenizer, messages) for messages in conversations]
    ids, mask = left_padded(prompts, tokenizer.pad_token_id, model.device)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def by_predict(model, tokenizer, conversations: list[list[dict]], config) -> list[str]:
    return [answer.text for answer in answer_batch(model, tokenizer, conversations, config)]


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", type=Path, required=True, help="directory of a model")
    parser.add_argument("--test_path", type=Path, default=Path("data/test.json"), help="samples")
    parser.add_argument("--device", default="auto", help="auto, cpu or the number of a GPU")
    parser.add_argument("--questions", type=int, default=64, help="number of questions answered")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens of each answer")
    args = parser.parse_args()

    device, directory = pick_device(args.device), ModelDirectory(args.model_path)
    tokenizer, model = directory.tokenizer, directory.load().to(device)
    config = greedy(directory.generation_config, args.max_new_tokens)
    config.eos_token_id = [tokenizer.vocab_size]  # of no token, so that all runs do the same work
    prompts = distinct_prompts(args.test_path)
    prompts = prompts[:: max(1, len(prompts) // args.questions)][: args.questions]  # of all roles
    prompts.sort(key=lambda messages: -sum(len(message["content"]) for message in messages))
    by_predict(model, tokenizer, prompts[:1], config)  # warm-up
    print(f"{len(prompts)} questions, {args.max_new_tokens} tokens each, {torch.get_num_threads()} threads")
    print("way          batch  answers/s  per s of processor time")
    ways = [(way, size) for size in BATCH_SIZES for way in (by_generate, by_predict)]
    rates, expected = {way: [] for way in ways}, None
    for _ in range(ROUNDS):
        for way, size in ways:
            start, processor, answers = time.perf_counter(), time.process_time(), []
            for first in range(0, len(prompts), size):
                answers += way(model, tokenizer, prompts[first : first + size], config)
            seconds = time.perf_counter() - start, time.process_time() - processor
            rates[way, size].append([len(prompts) / spent for spent in seconds])
            expected = expected or answers
            if answers != expected:
                same = sum(a == b for a, b in zip(expected, answers))
                print(f"{way.__name__}, batch {size}: {same} of {len(prompts)} answers as in the first run")
    for (way, size), found in rates.items():
        clock, processor = map(statistics.median, zip(*found))
        print(f"{way.__name__:11} {size:6} {clock:10.2f} {processor:11.2f}")


if __name__ == "__main__":
    main()
