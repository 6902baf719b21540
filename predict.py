"""Answer a test set and score the answers, role by role.

    python3 predict.py --model_path "output_dir/epoch-1-step-1002-merge" --test_path data/test.json \\
        --baseline_path "Baichuan2-7B-Chat/" --html output_dir/report.html
    python3 predict.py --model_path "Baichuan2-7B-Chat/" --baseline_path "Baichuan2-7B-Chat/" \\
        --adapter_path output_dir/epoch-1-step-*[0-9]           # which checkpoint? The base is loaded once
    python3 predict.py --engine http://127.0.0.1:8000/v1        # a server with the LLaMA export answers

A sample of the tables is a question with all of its recorded answers. Under each table stands what its columns mean:

ROUGE-L     F-measure of the longest common subsequence of words (jieba's) with a recorded answer (Lin 2004), by
            rouge-chinese, as in the public evaluations of RoleBench; the mean over the question's recorded answers
distinct-2  distinct pairs of neighbouring words among all such pairs of a role's answers (Li et al. 2016,
            arXiv 1510.03055): low when the answers repeat themselves or each other
catchwords  answers that use one of the catchwords that the persona text quotes
stops       answers that end by themselves within --max_new_tokens
style       answers that a classifier trained on --train_path takes for their own role's (support/voice.py)
copied      the longest piece that an answer has in common with a training answer of its role (support/voice.py)

After them come the scores from the model's own likelihoods, see docs/scores.md: who said it, what the persona is worth,
staying in role, and the perplexity of plain text.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from data_helper import HUB_FILES, read_rows, read_samples, rolebench_file, rounds
from support.arguments import ArgumentParser, number_problems
from support.errors import Problems, UserError, entry_point, slow_imports
from support.files import followed, unwritable

SAMPLE = Path(__file__).parent / "data/sample"
CAVEAT = (
    "All general questions of RoleBench's test set also occur in its training set, under another role: "
    "their scores say how a role speaks, not what the model knows."
)


def parse_args(argv=None):
    parser = ArgumentParser(description="Answer a test set and score the answers, role by role.")
    add = parser.add_argument
    add("--model_path", type=Path, help="directory of the model, such as merge_params.py writes")
    adapters = "adapters over --model_path, each scored without merging; the base is loaded once"
    add("--adapter_path", type=followed, nargs="+", metavar="DIR", help=adapters)
    add("--test_path", type=Path, default=Path("data/test.json"), help="samples, from data_helper.py")
    baseline = "directory of a model to compare with, such as the base; with --adapter_path it may be --model_path"
    add("--baseline_path", type=Path, help=baseline)
    output = "JSON lines for the answers; others go beside it, to …-baseline.jsonl, …-NAME.jsonl. A stopped run goes on there"
    add("--output_path", type=Path, default=Path("output_dir/answers.jsonl"), help=output)
    add("--overwrite", action="store_true", help="answer all anew; where that is interrupted, go on without this flag")
    add("--html", type=Path, metavar="FILE", help="write a report too: tables, and answers side by side, in one file")
    add("--data_dir", type=Path, default=Path("data"), help="RoleBench files, which tell role-specific questions")
    add("--train_path", type=Path, default=Path("data/train.json"), help="training samples, for style and recall")
    add("--attacks", type=Path, default=SAMPLE / "attacks-zh.jsonl", help="JSON lines that try to break a role")
    add("--plain_text", type=Path, default=SAMPLE / "plain_text.txt", help="text of no role, for its perplexity")
    add("--answers_only", action="store_true", help="score the answers alone, without the scores from likelihoods")
    add("--device", default="auto", help="where to compute: auto, cpu (or -1), or the number of a GPU")
    add("--load_in_4bit", action="store_true", help="hold the linear layers in 4 bits: 5 GB instead of 15 at 7B")
    size = "questions answered side by side; by default what the memory holds, up to 128 (CPU: 64); 16 with --sample"
    add("--batch_size", type=int, help=size)
    add("--max_new_tokens", type=int, default=256, help="tokens of an answer at most")
    add("--sample", action="store_true", help="draw answers as generation_config.json says, instead of greedily")
    add("--engine", metavar="URL", help="an OpenAI-compatible server answers, in place of --model_path; needs openai")
    add("--engine_model", metavar="NAME", help="the model's name on that server; by default the first one there")
    add("--seed", type=int, default=1234, help="integer that decides the draws of --sample, and of the bootstrap")
    add("--resamples", type=int, default=1000, help="of the bootstrap, for the intervals")
    return parser.parse_args(argv)


# After the arguments, since these take seconds.
with slow_imports(parse_args, __name__):
    import torch
    from tqdm import tqdm
    from transformers import set_seed

    import utils
    from baichuan.generation_utils import Answer, answer_batch, greedy
    from support import report
    from support.answer_file import AnswerFile, answer_settings
    from support.answer_scores import answer_sections, measure_answers
    from support.candidates import Candidate, Loader, in_batches, name_candidates, rows_that_fit
    from support.forgetting import read_plain_text
    from support.in_role import attack_conversations, read_attacks
    from support.likelihood import Likelihood
    from support.likelihood_scores import Measured, heard_pictures, likelihood_sections, measure, role_personas
    from support.model_directory import pick_device
    from support.voice import read_training


# ---------------------------------------------------------------- answering


class Question(NamedTuple):
    """What is answered once and scored once, however many recorded answers the test set has for it."""

    role: str
    system: str
    prompt: str
    kind: str  # "role-specific", "general" or "other"; "" when no question is known; of conversations "round 1", "round 2", "round 3+"
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
            asked = (role, *(message["content"] for message in messages))  # roles may lack a system text of their own
            questions.setdefault(asked, new).references.append(answer)
    if not questions:
        raise UserError(f"{test_path}: holds no sample: write it with data_helper.py")
    if all(not question.kind for question in questions.values()):
        return list(questions.values())
    return [question._replace(kind=question.kind or "other") for question in questions.values()]


def question_kinds(data_dir: Path):
    """A function (role, prompt) → kind. The samples do not say it; the RoleBench files they were made from do.

    A prompt is the end of its question, since data_helper.py cuts the address off that a question may open with.
    """
    specific, general = (
        [
            row
            for name in HUB_FILES
            if kind in name and (path := rolebench_file(data_dir, name)).exists()
            for row in read_rows(path, None)
        ]
        for kind in ("zh_role_specific", "zh_general")
    )
    starts = range(64)  # an address is shorter; every end of a page-long question would take gigabytes
    kinds = {(row["role"], row["question"]): "general" for row in general}
    for row in specific:
        kinds |= {(row["role"], row["question"][start:]): "role-specific" for start in starts[: len(row["question"])]}
    return lambda role, prompt: kinds.get((role, prompt), "")


def answer_file(args, candidate: Candidate, questions: list[Question]) -> AnswerFile:
    """Raises: UserError, but not where other attacks are to be answered now: those are soon answered anew."""
    settings, attacks = answer_settings(args, candidate, questions), bool(questions) and questions[0].kind == "attack"
    return AnswerFile(candidate.output, settings, len(questions), args.overwrite, forget=attacks)


def answer_all(args, candidate: Candidate, questions: list[Question], loader: Loader) -> list[Answer]:
    """Answer the questions, batch by batch into the candidate's file. An interrupted run goes on from that."""
    file = answer_file(args, candidate, questions)
    if file.complete:
        print(f"{file.path}: has all answers of {candidate.name} already")
        return file.in_order()
    prompts = [question.messages for question in questions]
    # Those of one persona go together, which is then read once; the longest of them first, which go on longest.
    order = sorted(range(len(questions)), key=lambda number: persona_and_length(prompts[number]))
    if candidate.engine:
        left = [(number, prompts[number]) for number in order if number not in file.answers]
        found = candidate.engine.answers(left, args.batch_size or 128, args.max_new_tokens)
    else:
        model, tokenizer = loader(candidate), candidate.directory.tokenizer
        config = candidate.directory.generation_config
        if args.sample:
            config.update(do_sample=True, max_new_tokens=args.max_new_tokens)
        else:
            config = greedy(config, args.max_new_tokens)
        candidate.directory.refuse_to_fail_later(model, config, candidate.adapter)
        tokens = max(map(len, tokenizer.text_to_ids(["".join(turn["content"] for turn in turns) for turns in prompts])))
        # What is drawn depends on who is in a batch: with --sample it has the same size on every machine.
        size = args.batch_size or (16 if args.sample else rows_that_fit(model, tokens + args.max_new_tokens))

        def answer(batch):
            set_seed((args.seed + batch[0]) % 2**32)  # a run that was interrupted draws what it would have drawn
            return answer_batch(model, tokenizer, [prompts[number] for number in batch], config)

        batches = in_batches(answer, order, size, file.answers)
        found = (pair for batch, own in batches for pair in zip(batch, own) if pair[0] not in file.answers)

    with (
        file.writing() as add,
        tqdm(total=len(questions), initial=len(file.answers), desc=candidate.name, unit=" answers") as progress,
    ):
        for number, own in found:
            add(number, {"role": questions[number].role, "prompt": questions[number].prompt}, own)
            progress.update()
    return file.in_order()


def persona_and_length(messages: list[dict]) -> tuple[int, str, int]:
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    return -len(system), system, -sum(len(message["content"]) for message in messages)


# ---------------------------------------------------------------- likelihoods


def attack_questions(attacks: list[dict], personas: dict[str, str]) -> list[Question]:
    """What is answered to see whether a role breaks: each attack on each role."""
    conversations, roles = attack_conversations(attacks, personas), list(personas)
    return [
        Question(roles[number % len(roles)], messages[0]["content"], messages[-1]["content"], "attack", [], messages)
        for number, messages in enumerate(conversations)
    ]


def attacked(candidate: Candidate) -> Candidate:
    """The same, with the file for its answers to the attacks."""
    output = candidate.output
    return candidate._replace(output=output.with_name(f"{output.stem}-attacks{output.suffix}"))


def read_likelihoods(args, candidate: Candidate, questions: list[Question], loader: Loader) -> Measured:
    """The scores from the model's own likelihoods; its answers to the attacks go to a file beside the others."""
    attacks, texts = read_attacks(args.attacks), read_plain_text(args.plain_text)
    asked = attack_questions(attacks, role_personas(questions))
    answers = answer_all(args, attacked(candidate), asked, loader) if asked else []
    likelihood = Likelihood(loader(candidate), candidate.directory.tokenizer, utils, show_progress=True)
    return measure(likelihood, questions, attacks, [answer.text for answer in answers], texts)


# ---------------------------------------------------------------- the script


def argument_problems(args) -> list[str]:
    problems = number_problems(args, {"batch_size": 1, "max_new_tokens": 1, "resamples": 1, "seed": 0})
    if bool(args.model_path) == bool(args.engine):
        problems.append("give either --model_path or --engine: who answers?")
    if args.adapter_path and not args.model_path:
        problems.append("--adapter_path needs its base model, as --model_path")
    if args.engine and args.sample:
        problems.append("--sample: an --engine answers greedily: leave one of them out")
    if args.engine_model and not args.engine:
        problems.append("--engine_model: belongs to --engine: add it, or leave this out")
    taken = {path.resolve() for path in (args.test_path, args.train_path, args.attacks, args.plain_text)}
    outputs = {"--output_path": args.output_path} | ({"--html": args.html} if args.html else {})
    for flag, path in outputs.items():
        if path.resolve() in taken:
            problems.append(f"{flag} {path}: is another file of this run: name another one")
        taken.add(path.resolve())
        if problem := "it is no regular file" if path.exists() and not path.is_file() else unwritable(path.parent):
            problems.append(f"{flag} {path}: cannot be written: {problem}")
    if not args.test_path.is_file():
        problems.append(f"--test_path {args.test_path}: there is no such file: write it with data_helper.py")
    return problems


def read_inputs(args) -> tuple[torch.device, list[Question], list[Candidate]]:
    """Raises: UserError with all that is wrong, before anything slow."""
    with Problems() as problems:
        problems += argument_problems(args)
        if not (args.answers_only or args.engine):
            problems.of(read_attacks, args.attacks)
            problems.of(read_plain_text, args.plain_text)
        candidates = problems.of(name_candidates, args) if args.model_path or args.engine else []
        for candidate in candidates or []:
            problems.of(candidate.check, args.load_in_4bit)
        device = problems.of(pick_device, args.device)
        if args.test_path.is_file():
            questions = problems.of(read_questions, args.test_path, args.data_dir)
    systems = list({question.system for question in questions})
    for model in [candidate.directory for candidate in candidates if candidate.directory]:
        room = model.config.model_max_length
        if max(map(len, model.tokenizer.text_to_ids(systems))) + args.max_new_tokens >= room - 1:
            raise UserError(
                f"{args.test_path}: a system text and --max_new_tokens {args.max_new_tokens} exceed {room} tokens"
            )
    with Problems() as problems:  # of files that are there already
        attacks = [] if args.answers_only or args.engine else read_attacks(args.attacks)
        asked = attack_questions(attacks, role_personas(questions))
        for candidate in candidates:
            problems.of(answer_file, args, candidate, questions)
            if asked:
                problems.of(answer_file, args, attacked(candidate), asked)
            if args.html and args.html.resolve() in (candidate.output.resolve(), attacked(candidate).output.resolve()):
                problems.append(f"--html {args.html}: is a file of answers of this run: name another one")
    return device, questions, candidates


@entry_point
def main(argv=None):
    args = parse_args(argv)
    device, questions, candidates = read_inputs(args)
    style, recall, remarks = read_training(args.train_path, [question.role for question in questions])

    # 1. Each model is loaded once, answers and is measured. Adapters of one base share its weights.
    loader, answers, measured, likelihoods = Loader(device, args.load_in_4bit), {}, {}, {}
    for candidate in candidates:
        answers[candidate.name] = answer_all(args, candidate, questions, loader)
        measured[candidate.name] = measure_answers(questions, answers[candidate.name], style, recall)
        if not (args.answers_only or args.engine):
            likelihoods[candidate.name] = read_likelihoods(args, candidate, questions, loader)
    loader.drop()

    # 2. The tables.
    sections = answer_sections(questions, measured, style, recall, args.resamples, args.seed)
    sections += likelihood_sections(likelihoods, args.resamples, args.seed)
    kinds = {question.kind for question in questions}
    if "" in kinds:
        remarks.append(f"No RoleBench file in {args.data_dir} has these questions, and tells what kind they are of.")
    if "general" in kinds:
        remarks.append(CAVEAT)
    if args.engine:
        remarks.append("A server gives answers only: scores from likelihoods are left out.")
    print("", *sections, *remarks, sep="\n")
    if args.html:
        report.write(args.html, sections, remarks, questions, answers, measured, heard_pictures(likelihoods))
        print(f"{args.html}: the report, for a browser", file=sys.stderr)


if __name__ == "__main__":
    main()
