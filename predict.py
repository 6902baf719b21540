"""Did training work? Answer a test set, and see in one table what has changed.

    python3 predict.py --model_path "output_dir/epoch-1-step-1002-merge" --test_path data/test.json \\
        --baseline_path "Baichuan2-7B-Chat/" --html output_dir/report.html
    python3 predict.py --model_path "Baichuan2-7B-Chat/" --baseline_path "Baichuan2-7B-Chat/" \\
        --adapter_path output_dir/epoch-1-step-*[0-9]           # which checkpoint? The base is loaded once
    python3 predict.py --engine http://127.0.0.1:8000/v1        # a server with the LLaMA export answers
    python3 predict.py … --by role                              # the same rows for each role; or kind, or round

A row is a measure, a column a model; differences are paired, and marked where their 95 % interval excludes 0. What is
answered once and scored once is a question with all of its recorded answers. docs/scores.md describes the measures.
"""

import sys
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from support.command_line import ArgumentParser, number_problems
from support.dialogues.samples import read_samples, rounds, unsupervised, with_system
from support.errors import Problems, UserError, entry_point, slow_imports
from support.files import followed, unwritable

SAMPLE_DIR = Path(__file__).parent / "data/sample"


def parse_args(argv=None):
    parser = ArgumentParser(description="Answer a test set and score the answers.")
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
    add("--by", choices=["role", "kind", "round"], help="print the same rows for each role, kind of question, or round")
    add("--html", type=Path, metavar="FILE", help="write a report too: pictures, and answers side by side, in one file")
    add("--lang", choices=["en", "zh"], help="language of the table and of the report; by default the system's")
    add("--train_path", type=Path, default=Path("data/train.json"), help="training samples, for style and copies")
    add("--attacks", type=Path, default=SAMPLE_DIR / "attacks-zh.jsonl", help="JSON lines that try to break a role")
    add("--plain_text", type=Path, default=SAMPLE_DIR / "plain_text.txt", help="text of no role, for its perplexity")
    add("--answers_only", action="store_true", help="score the answers alone, without what comes from likelihoods")
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

    from support.device import pick_device
    from support.model.answering import Answer, answer_batch, greedy, in_batches, rows_that_fit
    from support.model.server import Server
    from support.scores import report
    from support.scores.answers import measure_answers, recorded_limits
    from support.scores.candidates import AnswerFile, Candidate, Loader, answer_settings, name_candidates, read_answers
    from support.scores.in_role import crossed, in_role_scores, read_attacks
    from support.scores.likelihood import Likelihood, plain_text_scores, read_plain_text
    from support.scores.persona import persona_scores, personas_of, read_personas
    from support.scores.table import about, compare, in_a_sentence, label_text, labels, system_language, table, texts
    from support.scores.voice import read_training


# ---------------------------------------------------------------- questions


class Question(NamedTuple):
    """What is answered once and scored once, however many recorded answers the test set has for it."""

    role: str
    system: str
    prompt: str
    kind: str | None  # "role-specific", "general", as the test set says; "other"; None where it says nothing
    round: str | None  # of conversations "round 1", "round 2", "round 3+"
    references: list[str]
    messages: list[dict]  # what was said before it, as recorded, and the question


def read_questions(test_path: Path) -> list[Question]:
    """The distinct questions of a test set, in its order; of a conversation each round, with the recorded history.

    Raises: UserError.
    """
    samples = list(read_samples(test_path))
    has_conversations = any(len(sample["messages"]) > 2 for sample in samples)
    has_kinds = any(sample.get("kind") for sample in samples)
    questions: dict[tuple[str, ...], Question] = {}
    for sample in samples:
        role, kind = sample["role"], sample.get("kind", "other") if has_kinds else None
        for messages, answer in rounds(sample):
            asked = (role, *(message["content"] for message in messages))  # roles may lack a system text of their own
            if asked not in questions:
                name = None
                if has_conversations:
                    number = sum(message["role"] == "user" for message in messages)
                    name = f"round {number}" if number < 3 else "round 3+"
                prompt = messages[-1]["content"]
                questions[asked] = Question(role, sample["system"], prompt, kind, name, [], messages)
            questions[asked].references.append(answer)
    if not questions:
        raise UserError(f"{test_path}: holds no sample: write it with data_helper.py")
    return list(questions.values())


def recorded_samples(questions: list[Question]) -> list[dict]:
    """The questions with their recorded answers as samples, in which the last answer alone is supervised."""
    samples = []
    for question in questions:
        asked = unsupervised([turn for turn in question.messages if turn["role"] != "system"])
        whose = {name: getattr(question, name) for name in ("role", "system", "kind", "round")}
        for reference in question.references:
            samples.append({**whose, "messages": [*asked, {"role": "assistant", "content": reference}]})
    return samples


def attack_questions(attacks: list[dict], personas: dict[str, str]) -> list[Question]:
    """What is answered to see whether a role breaks: each attack on each role."""
    questions = []
    for sample in crossed(attacks, personas):
        messages = with_system(sample["system"], sample["messages"])
        asked = messages[-1]["content"]
        questions.append(Question(sample["role"], sample["system"], asked, sample["kind"], None, [], messages))
    return questions


# ---------------------------------------------------------------- answering


def answer_all(args, candidate: Candidate, questions: list[Question], loader: Loader) -> list[Answer]:
    """Answer the questions, batch by batch into the candidate's file. An interrupted run goes on from that."""
    settings = answer_settings(
        candidate,
        questions,
        test=args.test_path.name,
        max_new_tokens=args.max_new_tokens,
        sampling_seed=args.seed if args.sample else None,
        load_in_4bit=args.load_in_4bit,
    )
    file = AnswerFile(candidate.output, settings, len(questions), args.overwrite)
    if file.changed:
        print(f"{file.path}: was answered under other settings ({file.changed}): all is answered anew", file=sys.stderr)
    if file.complete:
        print(f"{file.path}: has all answers of {candidate.name} already", file=sys.stderr)
        return file.in_order()
    prompts = [question.messages for question in questions]
    # Those of one persona go together, which is then read once; the longest of them first, which go on longest.
    order = sorted(range(len(questions)), key=lambda number: persona_and_length(prompts[number]))
    if candidate.server:
        left = [(number, prompts[number]) for number in order if number not in file.answers]
        found = candidate.server.answers(left, args.batch_size or 128, args.max_new_tokens)
    else:
        found = answer_here(args, candidate, loader(candidate), prompts, order, file.answers)

    with (
        file.writing() as add,
        tqdm(total=len(questions), initial=len(file.answers), desc=candidate.name, unit=" answers") as progress,
    ):
        for number, own in found:
            if number not in file.answers:
                add(number, {"role": questions[number].role, "prompt": questions[number].prompt}, own)
                progress.update()
    return file.in_order()


def answer_here(args, candidate: Candidate, model, prompts: list[list[dict]], order: list[int], done: dict):
    """An iterator over (number, answer), in this order, batch by batch; of a batch that is `done` in part, all of them.

    Raises: UserError at once, before anything is answered.
    """
    tokenizer, config = candidate.directory.tokenizer, candidate.directory.generation_config
    if args.sample:
        config.update(do_sample=True, max_new_tokens=args.max_new_tokens)
    else:
        config = greedy(config, args.max_new_tokens)
    candidate.directory.refuse_to_fail_later(model, config, candidate.adapter)
    size = args.batch_size
    if size is None and args.sample:
        size = 16  # what is drawn depends on who is in a batch, so it has the same size on every machine
    elif size is None:
        joined = ["".join(turn["content"] for turn in messages) for messages in prompts]
        longest = max(map(len, tokenizer.text_to_ids(joined)))
        size = rows_that_fit(model, longest + args.max_new_tokens)

    def answer(batch):
        set_seed((args.seed + batch[0]) % 2**32)  # a run that was interrupted draws what it would have drawn
        return answer_batch(model, tokenizer, [prompts[number] for number in batch], config)

    batches = in_batches(answer, order, size, done)
    return chain.from_iterable(zip(batch, answers) for batch, answers in batches)


def persona_and_length(messages: list[dict]) -> tuple[int, str, int]:
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    return -len(system), system, -sum(len(message["content"]) for message in messages)


# ---------------------------------------------------------------- likelihoods


def read_likelihoods(args, candidate: Candidate, questions: list[Question], loader: Loader, longest: int):
    """The scores from the model's own likelihoods, and who is heard. Its answers to the attacks go to a file of their own.

    longest: tokens that are read at most, the same for all models, so that all have the same items.
    """
    attacks, recorded = read_attacks(args.attacks), recorded_samples(questions)
    personas = {role: system for role, system in personas_of(recorded).items() if role}  # no name, nobody to be
    asked = attack_questions(attacks, personas)
    answers = answer_all(args, candidate.attacked(), asked, loader) if asked else []
    likelihood = Likelihood(loader(candidate), candidate.directory.tokenizer, longest, show_progress=True)
    said = read_personas(likelihood, recorded)
    scores = persona_scores(said)
    scores |= in_role_scores(likelihood, attacks, personas, [answer.text for answer in answers])
    scores |= plain_text_scores(likelihood, read_plain_text(args.plain_text))
    return scores, said


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
    outputs = {"--output_path": args.output_path}
    if args.html:
        outputs["--html"] = args.html
    for flag, path in outputs.items():
        if path.resolve() in taken:
            problems.append(f"{flag} {path}: is another file of this run: name another one")
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
        candidates, server = [], Server(args.engine, args.engine_model) if args.engine else None
        if args.model_path or server:
            adapters = args.adapter_path or []
            candidates = problems.of(
                name_candidates, args.output_path, args.model_path, adapters, args.baseline_path, server
            )
        for candidate in candidates or []:
            problems.of(candidate.check, args.load_in_4bit)
            for file in (candidate.output, candidate.attacked().output):
                for path in (file, file.with_name(f"{file.name}.part")):
                    problems.of(read_answers, path)
                if args.html and args.html.resolve() == file.resolve():
                    problems.append(f"--html {args.html}: is a file of answers of this run: name another one")
        device = problems.of(pick_device, args.device)
        if args.test_path.is_file():
            questions = problems.of(read_questions, args.test_path)
    systems = list({question.system for question in questions})
    for directory in [candidate.directory for candidate in candidates if candidate.directory]:
        room = directory.config.model_max_length
        if max(map(len, directory.tokenizer.text_to_ids(systems))) + args.max_new_tokens >= room - 1:
            raise UserError(
                f"{args.test_path}: a system text and --max_new_tokens {args.max_new_tokens} exceed {room} tokens"
            )
    return device, questions, candidates


@entry_point
def main(argv=None):
    args = parse_args(argv)
    device, questions, candidates = read_inputs(args)
    language = args.lang or system_language()
    text = texts(language)
    style, recall, remarks = read_training(args.train_path, questions, text)
    limits = recorded_limits(questions, style, recall)
    directories = [candidate.directory for candidate in candidates if candidate.directory]
    longest = min((directory.config.model_max_length for directory in directories), default=0)

    # 1. Each model is loaded once, answers and is measured. Adapters of one base share its weights.
    loader, answers, measured, scores, heard = Loader(device, args.load_in_4bit), {}, {}, {}, {}
    for candidate in candidates:
        name = candidate.name
        answers[name] = answer_all(args, candidate, questions, loader)
        measured[name] = measure_answers(questions, answers[name], style, recall, limits)
        scores[name] = measured[name].scores
        if not (args.answers_only or args.engine):
            likelihoods, heard[name] = read_likelihoods(args, candidate, questions, loader, longest)
            scores[name] = scores[name] | likelihoods
    loader.drop()

    # 2. The table, and what it says in a sentence.
    names, rows = list(scores), compare(scores, args.resamples, args.seed)
    if args.engine:
        remarks.append(text["engine"])
    named = {question.role for question in questions} - {""}
    remarks.insert(0, text["intervals"].format(len(questions), len(named)))
    sentences = in_a_sentence(rows, names, text)
    print("", *table(rows, names, text), "", *about(rows, text), *remarks, "", *sentences, sep="\n")
    found = labels(scores[names[0]], args.by) if args.by else []
    if args.by and not found:
        print("", text["nothing to split"].format(args.by), sep="\n")
    for label in found:
        part = compare(scores, args.resamples, args.seed, args.by, label)
        title = f"{label_text(args.by, label, text)} ({part[0].count})"
        print("", title, "", *table(part, names, text), sep="\n")

    # 3. The report.
    if args.html:
        roles = labels(scores[names[0]], "role")
        by_role = {role: compare(scores, args.resamples, args.seed, "role", role) for role in roles}
        remarks = [*about(rows, text), *remarks]
        report.write(args.html, language, sentences, remarks, rows, by_role, heard, questions, answers, measured)
        print(f"{args.html}: the report, for a browser", file=sys.stderr)


if __name__ == "__main__":
    main()
