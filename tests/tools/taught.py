"""The end of `make demo`: one question before and after training, and how many of ten are answered as taught.

    python3 -m tests.tools.taught --train_path output_dir/demo/train.json \\
        --before output_dir/demo/Baichuan2-tiny --after output_dir/demo/merged

The exit status is 1 if fewer than 8 of the 10 are.
"""

import sys

from rouge_chinese import Rouge

from data_helper import conversation, read_samples
from support.arguments import ArgumentParser
from support.errors import entry_point
from support.model_directory import ModelDirectory

QUESTIONS, ENOUGH, CLOSE = 10, 8, 0.8


def parse_args(argv=None):
    parser = ArgumentParser(description="Ask a model before and after training what it was taught.")
    parser.add_argument("--train_path", required=True, help="the training samples")
    parser.add_argument("--before", required=True, help="directory of the model before training")
    parser.add_argument("--after", required=True, help="directory of the merged model")
    return parser.parse_args(argv)


def ten_questions(train_path) -> list[dict]:
    """Samples from all over the file whose question has a single recorded answer."""
    samples = list(read_samples(train_path))
    asked = [(sample["role"], sample["prompt"]) for sample in samples]
    single = [sample for sample, question in zip(samples, asked) if asked.count(question) == 1]
    return single[:: max(1, len(single) // QUESTIONS)][:QUESTIONS]


def answers(directory, samples: list[dict]) -> list[str]:
    """Greedy answers of the model in `directory`, each by itself, as the chat page would ask for them."""
    directory = ModelDirectory(directory)
    model, config = directory.load(), directory.generation_config
    config.update(do_sample=False, max_new_tokens=80)
    conversations = [conversation(sample["system"], sample["prompt"]) for sample in samples]
    return [model.chat(directory.tokenizer, messages, generation_config=config) for messages in conversations]


def how_many_are_close(answers: list[str], samples: list[dict]) -> int:
    """Answers with a ROUGE-L of at least 0.8 with the recorded one, character by character."""
    close = 0
    for answer, sample in zip(answers, samples):
        score = Rouge(metrics=["rouge-l"]).get_scores(" ".join(answer or "。"), " ".join(sample["response"]))
        close += score[0]["rouge-l"]["f"] >= CLOSE
    return close


@entry_point
def main(argv=None):
    args = parse_args(argv)
    samples = ten_questions(args.train_path)
    first = samples[0]
    (before,) = answers(args.before, [first])
    after = answers(args.after, samples)
    close = how_many_are_close(after, samples)
    print(f"question 问题   {first['role']}：{first['prompt']}")
    print(f"before 训练前   {before}")
    print(f"after 训练后    {after[0]}")
    print(f"recorded 原文   {first['response']}")
    print(f"\n{close} of {len(samples)} trained questions are answered as taught.")
    if close < ENOUGH:
        for sample, answer in zip(samples, after):
            print(f"{sample['prompt']}\n  answered {answer}\n  taught   {sample['response']}", file=sys.stderr)
        print(f"error: {ENOUGH} should be; something in this installation computes wrongly", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
