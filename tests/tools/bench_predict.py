"""Answers a second, by predict.py's way and by transformers' `generate`: python3 tests/tools/bench_predict.py --model_path Baichuan2-tiny

The two take turns, --rounds times, and medians are compared. Where other programs share the cores, the processor time
says more than the clock.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from baichuan.generation_utils import messages_to_ids
from support.device import pick_device
from support.dialogues.samples import conversation, read_samples
from support.model.answering import answer_batch, greedy, left_padded
from support.model.directory import ModelDirectory


def distinct_prompts(test_path) -> list[list[dict]]:
    """The first question of each sample, as messages; none twice."""
    prompts = {}
    for sample in read_samples(test_path):
        question = next(turn["content"] for turn in sample["messages"] if turn["role"] == "user")
        prompts[sample["system"], question] = conversation(sample["system"], question)
    return list(prompts.values())


def by_generate(model, tokenizer, conversations: list[list[dict]], config) -> list[str]:
    """What `answer_batch` did at first: personas are read for every question, and a batch keeps its rows to its end."""
    prompts = [messages_to_ids(tokenizer, messages) for messages in conversations]
    ids, mask = left_padded(prompts, tokenizer.pad_token_id, model.device)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def by_predict(model, tokenizer, conversations: list[list[dict]], config) -> list[str]:
    return [answer.text for answer in answer_batch(model, tokenizer, conversations, config)]


def answer_in_batches(way, model, tokenizer, prompts, size: int, config) -> tuple[float, float, list[str]]:
    """All prompts answered, `size` side by side: answers a second by the clock and by processor time, and the answers."""
    start, processor = time.perf_counter(), time.process_time()
    order = sorted(range(len(prompts)), key=lambda number: -sum(len(message["content"]) for message in prompts[number]))
    answers = {}
    for first in range(0, len(prompts), size):
        batch = order[first : first + size]
        answers.update(zip(batch, way(model, tokenizer, [prompts[number] for number in batch], config)))
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return len(prompts) / seconds, len(prompts) / processor, [answers[number] for number in range(len(prompts))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", type=Path, required=True, help="directory of a model")
    parser.add_argument("--test_path", type=Path, default=Path("data/test.json"), help="samples")
    parser.add_argument("--device", default="auto", help="auto, cpu or the number of a GPU")
    parser.add_argument("--questions", type=int, default=64, help="number of questions answered")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 64], help="questions side by side")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens of an answer at most")
    parser.add_argument("--stop", action="store_true", help="eos ends an answer; without, all have --max_new_tokens")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")
    args = parser.parse_args()

    device, directory = pick_device(args.device), ModelDirectory(args.model_path)
    tokenizer, model = directory.tokenizer, directory.load().to(device)
    config = greedy(directory.generation_config, args.max_new_tokens)
    if not args.stop:
        config.eos_token_id = [tokenizer.vocab_size]  # of no token, so that all runs do the same work
    prompts = distinct_prompts(args.test_path)
    prompts = prompts[:: max(1, len(prompts) // args.questions)][: args.questions]  # of all roles
    by_predict(model, tokenizer, prompts[:1], config)  # warm-up
    print(
        f"{len(prompts)} questions of {args.model_path}, {args.max_new_tokens} tokens each, {torch.get_num_threads()} threads"
    )
    ways = [(way, size) for size in args.batch_sizes for way in (by_generate, by_predict)]
    rates, first = {way: [] for way in ways}, None
    for _ in range(args.rounds):
        for way, size in ways:
            *rate, answers = answer_in_batches(way, model, tokenizer, prompts, size, config)
            rates[way, size].append(rate)
            first = first or answers
            same = sum(a == b for a, b in zip(first, answers))
            print(
                f"{way.__name__:11} batch {size:4}: {rate[0]:6.2f} answers/s, {same} of {len(prompts)} like the first"
            )
    print("medians: answers a second by the clock, by processor time, and both times the first line")
    medians = {way: [statistics.median(values) for values in zip(*found)] for way, found in rates.items()}
    for (way, size), found in medians.items():
        ratios = [value / slowest for value, slowest in zip(found, medians[ways[0]])]
        print(f"{way.__name__:11} batch {size:4}: " + "".join(f"{value:8.2f}" for value in (*found, *ratios)))


if __name__ == "__main__":
    main()
