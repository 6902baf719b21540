"""Answers a second, one by one and in batches: python3 tests/tools/bench_predict.py --model_path Baichuan2-tiny"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import predict
from support.model_directory import ModelDirectory


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", type=Path, required=True, help="directory of a model")
    parser.add_argument("--test_path", type=Path, default=Path("data/test.json"), help="samples")
    parser.add_argument("--device", default="auto", help="auto, cpu or the number of a GPU")
    parser.add_argument("--questions", type=int, default=32, help="number of questions answered")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16], help="questions side by side")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens of every answer: eos does not end it")
    args = parser.parse_args()

    device = predict.pick_device(args.device)
    directory = ModelDirectory(args.model_path)
    tokenizer, generation_config = directory.tokenizer, directory.generation_config
    model = directory.load().to(device)
    config = predict.greedy(generation_config, args.max_new_tokens)
    config.eos_token_id = [tokenizer.vocab_size]  # of no token, so that all runs do the same work
    questions = predict.read_questions(args.test_path, Path("data"))[: args.questions]
    prompts = [predict.conversation(question.system, question.prompt) for question in questions]
    predict.answer_batch(model, tokenizer, prompts[:1], config)  # warm-up
    print(
        f"{len(prompts)} questions of {args.model_path}, {args.max_new_tokens} tokens each, {torch.get_num_threads()} threads"
    )
    rates = []
    for size in args.batch_sizes:
        start = time.perf_counter()
        for first in range(0, len(prompts), size):
            predict.answer_batch(model, tokenizer, prompts[first : first + size], config)
        rates.append(len(prompts) / (time.perf_counter() - start))
        print(
            f"batch {size:4}: {rates[-1]:7.2f} answers/s, {rates[-1] / rates[0]:5.2f} times batch {args.batch_sizes[0]}"
        )


if __name__ == "__main__":
    main()
