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

from support.command_line import ArgumentParser, integer
from support.dialogues.samples import read_samples, rounds, unsupervised, with_system
from support.errors import Problems, UserError, entry_point, slow_imports
from support.files import followed, unwritable

SAMPLE_DIR = Path(__file__).parent / "data/sample"


def parse_args(argv=None):
    parser = ArgumentParser(description="Answer a test set and score the answers.")
    add, who = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--model_path", type=Path, help="directory of the model, such as merge_params.py writes")
    server = "an OpenAI-compatible server answers, in place of --model_path; needs openai"
    who.add_argument("--engine", metavar="URL", help=server)
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
    add("--batch_size", type=integer(1), help=size)
    add("--max_new_tokens", type=integer(1), default=256, help="tokens of an answer at most")
    add("--sample", action="store_true", help="draw answers as generation_config.json says, instead of greedily")
    add("--engine_model", metavar="NAME", help="the model's name on that server; by default the first one there")
    add("--seed", type=integer(0), default=1234, help="decides the draws of --sample, and of the bootstrap")
    add("--resamples", type=integer(1), default=1000, help="of the bootstrap, for the intervals")
    return parser.parse_args(argv)


# After the arguments, since these take seconds.
with slow_imports(parse_args, __name__):
    import torch
    from tqdm import tqdm
    from transformers import set_seed

    from support.device import pick_device
    from support.model.answering import Answer, answer_batch, greedy, in_batches, rows_that_fit
    from support.scores import report
    from support.scores.answers import measure_answers, recorded_limits
    from support.scores.candidates import Candidate, Loader, Transcript, name_candidates, read_transcript, version_of
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
        kind = sample.get("kind", "other") if has_kinds else None
        for messages, answer in rounds(sample):
            number = sum(message["role"] == "user" for message in messages)
            label = ("round 1", "round 2", "round 3+")[min(number, 3) - 1] if has_conversations else None
            new = Question(sample["role"], sample["system"], messages[-1]["content"], kind, label, [], messages)
            key = (sample["role"], *(message["content"] for message in messages))  # a role may lack a system text
            questions.setdefault(key, new).references.append(answer)
    if not questions:
        raise UserError(f"{test_path}: holds no sample: write it with data_helper.py")
    return list(questions.values())


def recorded_samples(questions: list[Question]) -> list[dict]:
    """The questions with their recorded answers as samples, in which the last answer alone is supervised."""
    samples = []
    for question in questions:
        turns = unsupervised([turn for turn in question.messages if turn["role"] != "system"])
        for reference in question.references:
            samples.append({**question._asdict(), "messages": [*turns, {"role": "assistant", "content": reference}]})
    return samples


# ---------------------------------------------------------------- answering


def generate_answers(args, candidate: Candidate, questions: list[Question], loader: Loader) -> list[Answer]:
    """Answer the questions, batch by batch into the candidate's file. An interrupted run goes on from that."""
    version = version_of(args, candidate, questions)
    transcript = Transcript(candidate.output, version, questions, args.overwrite)
    if transcript.changed:
        message = f"was answered under other settings ({', '.join(transcript.changed)}): all is answered anew"
        print(f"{transcript.path}: {message}", file=sys.stderr)
    if transcript.complete:
        print(f"{transcript.path}: has all answers of {candidate.name} already", file=sys.stderr)
        return transcript.in_order()

    def persona_and_length(number):
        """Those of one persona go together, which is then read once; the longest of them first, which go on longest."""
        question = questions[number]
        length = sum(len(message["content"]) for message in question.messages)
        return -len(question.system), question.system, -length

    order = sorted(range(len(questions)), key=persona_and_length)
    if candidate.server:
        left = [(number, questions[number].messages) for number in order if number not in transcript.answers]
        numbered = candidate.server.generate_all(left, args.batch_size or 128, args.max_new_tokens)
    else:
        numbered = generate_here(args, candidate, loader(candidate), questions, order, transcript.answers)
    known = len(transcript.answers)
    with tqdm(total=len(questions), initial=known, desc=candidate.name, unit=" answers") as progress:
        for number, answer in numbered:
            if number not in transcript.answers:
                transcript.add(number, answer)
                progress.update()
    return transcript.in_order()


def generate_here(args, candidate: Candidate, model, questions: list[Question], order: list[int], done: dict):
    """An iterator over (number, answer), in this order; of a batch that is `done` in part, all of them.

    Raises: UserError at once, before anything is answered.
    """
    tokenizer, config = candidate.directory.tokenizer, candidate.directory.generation_config
    if args.sample:
        config.update(do_sample=True, max_new_tokens=args.max_new_tokens)
    else:
        config = greedy(config, args.max_new_tokens)
    candidate.directory.refuse_to_fail_later(model, candidate.adapter)
    if args.batch_size:
        size = args.batch_size
    elif args.sample:
        size = 16  # what is drawn depends on who is in a batch, so it has the same size on every machine
    else:
        texts = ["".join(turn["content"] for turn in question.messages) for question in questions]
        longest = max(map(len, tokenizer.text_to_ids(texts)))
        size = rows_that_fit(model, longest + args.max_new_tokens)

    def generate(batch):
        set_seed((args.seed + batch[0]) % 2**32)  # a run that was interrupted draws what it would have drawn
        try:
            return answer_batch(model, tokenizer, [questions[number].messages for number in batch], config)
        except ValueError as error:  # a system text leaves no room
            raise UserError(f"{args.test_path}: {error}") from error

    batches = in_batches(generate, order, size, done)
    return chain.from_iterable(zip(batch, answers) for batch, answers in batches)


# ---------------------------------------------------------------- likelihoods


def read_likelihoods(args, candidate: Candidate, questions: list[Question], loader: Loader, longest: int):
    """The scores from the model's own likelihoods, and its readings. Its answers to the attacks go to a file of their own.

    longest: tokens that are read at most, the same for all models, so that all have the same items.
    """
    attacks, recorded = read_attacks(args.attacks), recorded_samples(questions)
    personas = {role: system for role, system in personas_of(recorded).items() if role}  # no name, nobody to be
    attacking = []
    for sample in crossed(attacks, personas):
        role, system = sample["role"], sample["system"]
        messages = with_system(system, sample["messages"])
        attacking.append(Question(role, system, messages[-1]["content"], sample["kind"], None, [], messages))
    answers = generate_answers(args, candidate.attacked(), attacking, loader) if attacking else []
    likelihood = Likelihood(loader(candidate), candidate.directory.tokenizer, longest, show_progress=True)
    readings = read_personas(likelihood, recorded)
    scores = persona_scores(readings)
    scores |= in_role_scores(likelihood, attacks, personas, [answer.text for answer in answers])
    scores |= plain_text_scores(likelihood, read_plain_text(args.plain_text))
    return scores, readings


# ---------------------------------------------------------------- the script


def read_inputs(args) -> tuple[torch.device, list[Question], list[Candidate]]:
    """Raises: UserError with all that is wrong, before anything slow."""
    with Problems() as problems:
        if args.engine and (args.adapter_path or args.sample):
            problems.append("--engine: answers greedily and without adapters: leave --sample and --adapter_path out")
        for path in filter(None, (args.output_path, args.html)):
            if problem := "it is no regular file" if path.exists() and not path.is_file() else unwritable(path.parent):
                problems.append(f"{path}: cannot be written: {problem}")
        questions = problems.of(read_questions, args.test_path)
        if not (args.answers_only or args.engine):
            problems.of(read_attacks, args.attacks)
            problems.of(read_plain_text, args.plain_text)
        candidates = name_candidates(args)
        for candidate in candidates:
            problems.of(candidate.check, args.load_in_4bit)
            problems.of(read_transcript, candidate.output)
            problems.of(read_transcript, candidate.attacked().output)
        device = problems.of(pick_device, args.device)
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
    loader = Loader(device, args.load_in_4bit)
    measured, scores, heard = {}, {}, {}  # by the model's name
    for candidate in candidates:
        name = candidate.name
        answers = generate_answers(args, candidate, questions, loader)
        measured[name] = measure_answers(questions, answers, style, recall, limits)
        scores[name] = measured[name].scores
        if not (args.answers_only or args.engine):
            likelihoods, heard[name] = read_likelihoods(args, candidate, questions, loader, longest)
            scores[name] = scores[name] | likelihoods

    # 2. The table, and what it says in a sentence.
    names, rows = list(scores), compare(scores, args.resamples, args.seed)
    named = {question.role for question in questions} - {""}
    remarks = [*about(rows, text), text["intervals"].format(len(questions), len(named)), *remarks]
    if args.engine:
        remarks.append(text["engine"])
    sentences = in_a_sentence(rows, names, text)
    print("", *table(rows, names, text), "", *remarks, "", *sentences, sep="\n")
    parts = labels(scores[names[0]], args.by) if args.by else []
    if args.by and not parts:
        print("", text["nothing to split"].format(args.by), sep="\n")
    for label in parts:
        rows_of_part = compare(scores, args.resamples, args.seed, args.by, label)
        title = f"{label_text(args.by, label, text)} ({rows_of_part[0].count})"
        print("", title, "", *table(rows_of_part, names, text), sep="\n")

    # 3. The report.
    if args.html:
        roles = labels(scores[names[0]], "role")
        by_role = {role: compare(scores, args.resamples, args.seed, "role", role) for role in roles}
        shown = {"sentences": sentences, "remarks": remarks, "rows": rows, "by_role": by_role, "heard": heard}
        report.write(args.html, language, questions, measured, **shown)
        print(f"{args.html}: the report, for a browser", file=sys.stderr)


if __name__ == "__main__":
    main()
