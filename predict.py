"""Answer a test set and score the answers, role by role.

    python3 predict.py --model_path "output_dir/epoch-1-step-1002-merge" --test_path data/test.json \\
        --baseline_path "Baichuan2-7B-Chat/"

A sample of the table is a question with all of its recorded answers. Its columns, all in percent:

ROUGE-L     F-measure of the longest common subsequence of words (jieba's) with a recorded answer (Lin 2004), by
            rouge-chinese, as in the public evaluations of RoleBench; the mean over the question's recorded answers
distinct-2  distinct pairs of neighbouring words among all such pairs of a role's answers (Li et al. 2016,
            arXiv 1510.03055): low when the answers repeat themselves or each other
catchwords  answers that use one of the catchwords that the persona text quotes
stops       answers that end by themselves within --max_new_tokens
"""

import gc
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from data_helper import read_rows, read_samples, rounds
from support.arguments import ArgumentParser, number_problems
from support.errors import Problems, UserError, entry_point, slow_imports
from support.files import put_on_disk
from support.four_bit import check_four_bit

CAVEAT = (
    "All general questions of RoleBench's test set also occur in its training set, under another role: "
    "their scores say how a role speaks, not what the model knows."
)


def parse_args(argv=None):
    parser = ArgumentParser(description="Answer a test set and score the answers, role by role.")
    add = parser.add_argument
    add("--model_path", type=Path, required=True, help="directory of the model, such as merge_params.py writes")
    add("--test_path", type=Path, default=Path("data/test.json"), help="samples, from data_helper.py")
    add("--baseline_path", type=Path, help="directory of a second model to compare with, such as the base model")
    add(
        "--output_path",
        type=Path,
        default=Path("output_dir/answers.jsonl"),
        help="JSON lines for the answers; the baseline's go beside it, to …-baseline.jsonl. A run that was interrupted "
        "goes on where these files end",
    )
    add("--overwrite", action="store_true", help="answer everything anew, whatever the files of answers hold")
    add("--data_dir", type=Path, default=Path("data"), help="RoleBench files, which tell role-specific questions")
    add("--device", default="auto", help="where to compute: auto, cpu (or -1), or the number of a GPU")
    add("--load_in_4bit", action="store_true", help="hold the linear layers in 4 bits: 5 GB instead of 15 at 7B")
    add("--batch_size", type=int, default=16, help="questions answered side by side")
    add("--max_new_tokens", type=int, default=256, help="tokens of an answer at most")
    add("--sample", action="store_true", help="draw answers as generation_config.json says, instead of greedily")
    add("--seed", type=int, default=1234, help="integer that decides the draws of --sample, and of the bootstrap")
    add("--resamples", type=int, default=1000, help="of the bootstrap, for the intervals of the differences")
    return parser.parse_args(argv)


# After the arguments, since these take seconds.
with slow_imports(parse_args, __name__):
    import numpy as np
    import torch
    from tqdm import tqdm
    from transformers import set_seed

    from baichuan.generation_utils import Answer, answer_batch, greedy
    from support.model_directory import ModelDirectory, pick_device
    from support.scores import COLUMNS, Scores, interval
    from support.tables import markdown


# ---------------------------------------------------------------- answering


class Question(NamedTuple):
    """What is answered once and scored once, however many recorded answers the test set has for it."""

    role: str
    system: str
    prompt: str
    kind: str  # "role-specific" or "general"; "" when that is not known; "round 1", "round 2" or "round 3+" of conversations
    references: list[str]
    messages: list[dict]  # what was said before it, as recorded, and the question


def read_questions(test_path: Path, data_dir: Path) -> list[Question]:
    """The distinct questions of a test set, in its order; of a conversation each round, with the recorded history.

    Raises: UserError.
    """
    kind_of, samples = question_kinds(data_dir), list(read_samples(test_path))
    conversations = any(len(sample["messages"]) > 2 for sample in samples)
    questions: dict[tuple[str, ...], Question] = {}
    for sample in samples:
        for messages, answer in rounds(sample):
            role, prompt = sample["role"], messages[-1]["content"]
            number = sum(message["role"] == "user" for message in messages)
            kind = f"round {number}" if number < 3 else "round 3+"
            kind = kind if conversations else kind_of(role, prompt)
            new = Question(role, sample["system"], prompt, kind, [], messages)
            questions.setdefault(tuple(message["content"] for message in messages), new).references.append(answer)
    if not questions:
        raise UserError(f"{test_path}: holds no sample: write it with data_helper.py")
    return list(questions.values())


def question_kinds(data_dir: Path):
    """A function (role, prompt) → kind. The samples do not say it; the RoleBench files they were made from do.

    A prompt is the end of its question, since data_helper.py cuts the address off that a question may open with.
    """
    files = [data_dir / f"rolebench-zh_role_specific_{split}.jsonl" for split in ("test", "train")]
    rows = [row for file in files if file.exists() for row in read_rows(file, None)]
    if not rows:
        return lambda role, prompt: ""
    specific = {(row["role"], row["question"][start:]) for row in rows for start in range(len(row["question"]))}
    return lambda role, prompt: "role-specific" if (role, prompt) in specific else "general"


def run_settings(args, model: ModelDirectory) -> dict:
    """What the answers depend on. The batch size is left out, so that a run may go on with a smaller one."""
    digest = hashlib.sha256(args.test_path.read_bytes())
    for file in [*model.weights.files, model.path / "generation_config.json"]:
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    settings = {"model": model.path.resolve().name, "test": args.test_path.name, "max_new_tokens": args.max_new_tokens}
    settings |= {"load_in_4bit": True} if args.load_in_4bit else {}
    return {**settings, "sampling_seed": args.seed if args.sample else None, "digest": digest.hexdigest()[:16]}


def read_answers(path: Path, settings: dict) -> dict[int, Answer]:
    """The answers of an interrupted run, by the number of the question. A last line that was cut off is removed.

    Raises:
        UserError: the file is something else, or its answers were given under other settings.
    """
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if not whole and (not data or data.startswith(b'{"settings"')):
        return {}
    try:
        first, *lines = whole.decode("utf-8").split("\n")[:-1]
        found = json.loads(first)["settings"]
        answers = {line["question"]: Answer(line["answer"], line["stopped"]) for line in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is no file of answers: name another --output_path") from None
    if found != settings:
        names = [name for name in settings if found.get(name) != settings[name]]
        differing = ", ".join(f"{name} {found.get(name)}, now {settings[name]}" for name in names)
        remedy = "name another --output_path, or answer anew with --overwrite"
        raise UserError(f"{path}: holds answers under other settings ({differing}): {remedy}")
    if len(whole) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return answers


def answer_all(args, directory: ModelDirectory, path: Path, questions: list[Question], device) -> list[Answer]:
    """Answer the questions, batch by batch into `path`.part, which takes the name `path` once it holds all answers.

    An interrupted run goes on from that.
    """
    settings, part = run_settings(args, directory), path.with_name(f"{path.name}.part")
    answers = {} if args.overwrite else read_answers(path, settings)
    if len(answers) == len(questions):
        print(f"{path}: has all answers of {directory.path} already")
        return [answers[number] for number in range(len(questions))]
    answers = {} if args.overwrite else read_answers(part, settings)

    tokenizer, generation_config = directory.tokenizer, directory.generation_config
    model = directory.load(four_bit_on=device if args.load_in_4bit else None).to(device)
    if args.sample:
        generation_config.update(do_sample=True, max_new_tokens=args.max_new_tokens)
    else:
        generation_config = greedy(generation_config, args.max_new_tokens)
    directory.refuse_to_fail_later(model, generation_config)
    prompts = [question.messages for question in questions]
    # Questions of about the same length go together; the longest first, so that memory fails at once or not at all.
    order = sorted(
        range(len(questions)), key=lambda number: -sum(len(message["content"]) for message in prompts[number])
    )
    batches = [order[start : start + args.batch_size] for start in range(0, len(order), args.batch_size)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(part, "a" if answers else "w", encoding="utf-8") as file,
        tqdm(total=len(questions), initial=len(answers), desc=directory.path.name, unit=" answers") as progress,
    ):
        if not answers:
            file.write(json.dumps({"settings": settings}, ensure_ascii=False) + "\n")
        for batch in batches:
            if not (missing := [number for number in batch if number not in answers]):
                continue
            set_seed((args.seed + batch[0]) % 2**32)  # a run that was interrupted draws what it would have drawn
            found = dict(
                zip(batch, answer_batch(model, tokenizer, [prompts[number] for number in batch], generation_config))
            )
            for number in missing:
                question, answer = questions[number], found[number]
                answers[number] = answer
                line = {"question": number, "role": question.role, "prompt": question.prompt}
                line |= {"answer": answer.text, "stopped": answer.stopped}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            progress.update(len(missing))
    put_on_disk(part)
    part.replace(path)
    return [answers[number] for number in range(len(questions))]


# ---------------------------------------------------------------- the table


def table(questions: list[Question], models: dict[str, Scores], resamples: int, seed: int) -> str:
    """A Markdown table a kind of question; with two models a role has three rows, the last one their difference."""
    lines = []
    for kind in dict.fromkeys(question.kind for question in questions):
        roles = list(dict.fromkeys(question.role for question in questions if question.kind == kind))
        rows = [["role", "", "samples", *COLUMNS]]
        for chosen in [[role] for role in roles] + ([roles] if len(roles) > 1 else []):
            taken = np.array([question.kind == kind and question.role in chosen for question in questions], dtype=int)
            label = chosen[0] if len(chosen) == 1 else "all"
            for name, scores in models.items():
                cells = ["–" if np.isnan(value) else f"{value:.1f}" for value in scores.measure(taken)]
                rows.append([label, name, str(taken.sum()), *cells])
            if len(models) == 2:
                baseline, tuned = models.values()
                ends = interval(tuned, baseline, taken, resamples, seed)
                difference = tuned.measure(taken) - baseline.measure(taken)
                cells = [
                    "–" if np.isnan(d) else f"{d:+.1f} [{low:+.1f}, {high:+.1f}]"
                    for d, low, high in zip(difference, *ends)
                ]
                rows.append([label, "difference", "", *cells])
        lines += [f"{kind.capitalize() or 'All'} questions", "", *markdown(rows), ""]
    return "\n".join(lines)


# ---------------------------------------------------------------- the script


def read_inputs(args) -> tuple[torch.device, list[Question], list[ModelDirectory]]:
    """Raises: UserError with all that is wrong, before anything slow."""
    models = [ModelDirectory(path) for path in (args.baseline_path, args.model_path) if path]
    with Problems() as problems:
        problems += number_problems(args, {"batch_size": 1, "max_new_tokens": 1, "resamples": 1, "seed": 0})
        for model in models:
            if (model.path / "adapter_config.json").exists():
                problems.append(f"{model.path}: is an adapter: merge it into its base with merge_params.py first")
            else:
                problems.of(model.check)
                if args.load_in_4bit and not problems:
                    problems.of(check_four_bit, model)
        if args.output_path.resolve() == args.test_path.resolve():
            problems.append(f"--output_path {args.output_path}: is the file of samples: name another one")
        device = problems.of(pick_device, args.device)
        if args.test_path.is_file():
            questions = problems.of(read_questions, args.test_path, args.data_dir)
        else:
            problems.append(f"--test_path {args.test_path}: there is no such file: write it with data_helper.py")
    longest = max({question.system for question in questions}, key=len)
    for model in models:
        room = model.config.model_max_length
        if len(model.tokenizer.text_to_ids(longest)) + args.max_new_tokens >= room - 1:
            raise UserError(
                f"{args.test_path}: a system text and --max_new_tokens {args.max_new_tokens} exceed {room} tokens"
            )
    return device, questions, models


@entry_point
def main(argv=None):
    args = parse_args(argv)
    device, questions, directories = read_inputs(args)
    baseline_output = args.output_path.with_name(f"{args.output_path.stem}-baseline{args.output_path.suffix}")
    names, outputs = ["baseline", "model"], [baseline_output, args.output_path]
    if not args.baseline_path:
        names, outputs = names[1:], outputs[1:]
    models = {}
    for name, directory, output in zip(names, directories, outputs):
        models[name] = Scores(questions, answer_all(args, directory, output, questions, device))
        gc.collect()  # the model just used makes room for the next
    print(table(questions, models, args.resamples, args.seed))
    kinds = {question.kind for question in questions}
    if "" in kinds:
        print(f"{args.data_dir} has no RoleBench files that tell role-specific questions from general ones.")
    if kinds & {"", "general"}:
        print(CAVEAT)


if __name__ == "__main__":
    main()
