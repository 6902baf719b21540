"""Answers a second, one by one and in batches: python3 tests/tools/bench_predict.py --model_path Baichuan2-tiny"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from baichuan.generation_utils import answer_batch, greedy
from data_helper import conversation, read_samples
from support.model_directory import ModelDirectory, pick_device


def distinct_prompts(test_path) -> list[list[dict]]:
    """The first question of each sample, as messages; none twice."""
    prompts = {}
    for sample in read_samples(test_path):
        question = next(turn["content"] for turn in sample["messages"] if turn["role"] == "user")
        prompts[sample["system"], question] = conversation(sample["system"], question)
    return list(prompts.values())


def answers_a_second(model, tokenizer, prompts: list[list[dict]], size: int, max_new_tokens: int) -> float:
    """All prompts answered, `size` side by side. No token ends an answer, so that all runs do the same work."""
    config = greedy(model.generation_config, max_new_tokens)
    config.eos_token_id = [tokenizer.vocab_size]
    start = time.perf_counter()
    for first in range(0, len(prompts), size):
        answer_batch(model, tokenizer, prompts[first : first + size], config)
    return len(prompts) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", type=Path, required=True, help="directory of a model")
    parser.add_argument("--test_path", type=Path, default=Path("data/test.json"), help="samples")
    parser.add_argument("--device", default="auto", help="auto, cpu or the number of a GPU")
    parser.add_argument("--questions", type=int, default=32, help="number of questions answered")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16], help="questions side by side")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens of every answer: eos does not end it")
    args = parser.parse_args()

    device, directory = pick_device(args.device), ModelDirectory(args.model_path)
    model = directory.load().to(device)
    prompts = distinct_prompts(args.test_path)[: args.questions]
    answers_a_second(model, directory.tokenizer, prompts[:1], 1, args.max_new_tokens)  # warm-up
    print(
        f"{len(prompts)} questions of {args.model_path}, {args.max_new_tokens} tokens each, {torch.get_num_threads()} threads"
    )
    rates = []
    for size in args.batch_sizes:
        rates.append(answers_a_second(model, directory.tokenizer, prompts, size, args.max_new_tokens))
        print(
            f"batch {size:4}: {rates[-1]:7.2f} answers/s, {rates[-1] / rates[0]:5.2f} times batch {args.batch_sizes[0]}"
        )


if __name__ == "__main__":
    main()
