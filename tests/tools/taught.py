"""The end of `make demo`: one question before and after training, and how many of ten are answered as taught.

    python3 -m tests.tools.taught --train_path output_dir/demo/train.json \\
        --before output_dir/demo/Baichuan2-tiny --after output_dir/demo/merged

The exit status is 1 if fewer than 8 of the 10 are. Where the file has conversations, ten of their later questions are asked
too, with the history and without it.
"""

import sys
from collections import Counter

from rouge_chinese import Rouge

from support.command_line import ArgumentParser
from support.dialogues.samples import conversation, read_samples, rounds
from support.errors import entry_point
from support.model.directory import ModelDirectory

QUESTIONS, ENOUGH, CLOSE = 10, 8, 0.8


def ten_questions(train_path, later: bool = False) -> list[dict]:
    """Rounds from all over the file as samples, with the question as "prompt" and the recorded answer as "response".

    First ones whose question has a single recorded answer or, with `later`, later ones whose question has several, each
    after another history.
    """
    found = []
    for sample in read_samples(train_path):
        for number, (messages, answer) in enumerate(rounds(sample)):
            if (number > 0) == later:
                found.append({**sample, "messages": messages, "prompt": messages[-1]["content"], "response": answer})
    answered = Counter((sample["role"], sample["prompt"]) for sample in found)
    chosen = [sample for sample in found if (answered[sample["role"], sample["prompt"]] > 1) == later]
    return [chosen[number * len(chosen) // QUESTIONS] for number in range(min(QUESTIONS, len(chosen)))]


def answers(directory, samples: list[dict], history: bool = False) -> list[str]:
    """Greedy answers of the model in `directory`, each by itself, as the chat page would ask for them."""
    directory = ModelDirectory(directory)
    model, config = directory.load(), directory.generation_config
    config.update(do_sample=False, max_new_tokens=80)
    conversations = [
        sample["messages"] if history else conversation(sample["system"], sample["prompt"]) for sample in samples
    ]
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
    parser = ArgumentParser(description="Ask a model before and after training what it was taught.")
    parser.add_argument("--train_path", required=True, help="the training samples")
    parser.add_argument("--before", required=True, help="directory of the model before training")
    parser.add_argument("--after", required=True, help="directory of the merged model")
    args = parser.parse_args(argv)
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
    if follow_ups := ten_questions(args.train_path, later=True):
        close = [how_many_are_close(answers(args.after, follow_ups, history), follow_ups) for history in (True, False)]
        print(f"{close[0]} of {len(follow_ups)} later questions are, and {close[1]} where the history is left out.")


if __name__ == "__main__":
    sys.exit(main())
