"""Samples, in the forms that people have them, read as conversations.

    {"role", "system", "prompt", "response"}              a question and its answer, as data_helper.py writes them
    {"instruction", "input", "output"}                    the same with the book's keys
    {"role", "system", "messages": [{"role", "content"}]} a conversation; OpenAI's form has the system text in it
    {"conversations": [{"from", "value"}]}                a conversation in ShareGPT's form

A file is JSON lines, read as they come, or one JSON array, which has to fit into memory. RoleBench's own files are read
by `read_rolebench`.
"""

import random
from collections import Counter, defaultdict
from pathlib import Path

from support.dialogues.json_files import composed, filled, read_records, text_problem
from support.errors import Problems, UserError

SPEAKERS = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


def read_samples(path: str | Path, merged: Counter | None = None, problems: list[str] | None = None):
    """Yield the samples of a file, whatever their form, as {"role", "system", "messages"}.

    The messages are {"role": "user" | "assistant", "content": str}, in turn, from a question, or a greeting before it, to
    an answer; one that is not to be trained carries "train": False. "kind", of what kind the question is, stays where it
    is a text.

    Args:
        merged: joins neighbouring turns of one speaker, and counts under "turns" what it joined.
        problems: takes what is wrong with samples, which are then left out.
    Raises:
        UserError: the file is something else; without `problems`, at the first that is no sample.
    """
    for where, record in read_records(path, problems):
        try:
            sample = as_sample(record, where, merged)
        except UserError as error:
            if problems is None:
                raise
            problems += error.problems
        else:
            yield sample


def as_sample(record: dict, where: str, merged: Counter | None = None) -> dict:
    """Check one record and give it the keys that `read_samples` describes. Raises: UserError, which says where it stands."""
    record = filled(record)
    system, turns = conversation_of(record, where) or question_of(record, where)
    if merged is not None:
        turns = merge_turns(turns, merged)
    sample = {"role": record.get("role", ""), "system": system}
    for key, text in sample.items():
        if text != "" and (problem := text_problem(text)):
            raise UserError(f'{where}: "{key}" {problem}')
    sample["role"] = composed(sample["role"])
    check_turns(turns, where)
    sample["messages"] = turns
    if isinstance(record.get("kind"), str):
        sample["kind"] = record["kind"]
    return sample


def question_of(record: dict, where: str) -> tuple[str, list[dict]]:
    """The system text and the two turns of a question with its answer. Raises: UserError.

    With the book's keys `instruction` is the system text; without an input, it is the question.
    """
    if record.get("history"):
        raise UserError(f'{where}: "history" is not read: write its rounds and the last one as "messages"')
    if not {"prompt", "response", "instruction", "output"} & record.keys():
        raise UserError(f'{where}: holds no sample: write "messages", or "prompt" and "response" (data/README.md)')
    books, ours = sorted({"instruction", "input", "output"} & record.keys()), {"prompt", "response"} & record.keys()
    if books and ours:
        raise UserError(f'{where}: has "{books[0]}" beside "{min(ours)}": write one of the forms in data/README.md')
    if {"instruction", "system", "input"} <= record.keys():
        raise UserError(f'{where}: has both "system" and "instruction": the two mean the same here: remove one')
    if {"instruction", "input"} <= record.keys():
        keys = ("instruction", "input", "output")
    elif {"instruction", "output"} & record.keys():
        keys = ("system", "input" if "input" in record else "instruction", "output")
    else:
        keys = ("system", "prompt", "response")
    system, prompt, response = (record.get(key) for key in keys)
    for key, text in zip(keys, (system or "。", prompt, response)):  # there may be no system text
        if problem := text_problem(text):
            raise UserError(f'{where}: "{key}" {problem}')
    return system or "", [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def conversation_of(record: dict, where: str) -> tuple[str, list[dict]] | None:
    """The system text and the turns of a conversation; None where the record holds none. Raises: UserError."""
    keys = [key for key in ("messages", "conversations") if key in record]
    if not keys:
        return None
    if len(keys) == 2:
        raise UserError(f'{where}: has both "messages" and "conversations": remove one')
    if not isinstance(record[keys[0]], list):
        raise UserError(f'{where}: "{keys[0]}" is no list of turns: write [{{"role": …, "content": …}}, …]')
    system, turns = record.get("system", ""), []
    for number, turn in enumerate(record[keys[0]], start=1):
        if not isinstance(turn, dict):
            raise UserError(f'{where}: turn {number} is no object: write {{"role": …, "content": …}}')
        given, turn = turn, filled(turn)
        # The turn's own keys decide, not the name of the list.
        sharegpt = "from" in turn and "role" not in turn
        speaker_key = "from" if sharegpt else "role"
        text_key = "value" if "content" not in turn and (sharegpt or "value" in turn) else "content"
        speaker, text = turn.get(speaker_key), given.get(text_key)
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            known = "human, gpt or system" if sharegpt else "user, assistant or system"
            raise UserError(f'{where}: turn {number}: "{speaker_key}" is {str(speaker)[:20]!r}: write {known}')
        if role == "system" and text_key not in turn:
            continue
        if problem := text_problem(text):
            raise UserError(f'{where}: turn {number}: "{text_key}" {problem}')
        if role == "system" and number > 1:
            raise UserError(f"{where}: turn {number} is the system's: only the first may be: move or remove it")
        if role == "system" and system:
            raise UserError(f'{where}: has a system text twice, in "system" and in turn 1: remove one')
        if not isinstance(turn.get("train", True), bool):
            raise UserError(f'{where}: turn {number}: "train" is neither true nor false: correct or remove it')
        if role == "system":
            system = text
        elif role == "assistant" and not (turns and turn.get("train", True) and turn.get("weight", 1)):
            # OpenAI's weight 0 means the same; and a greeting answers nothing.
            turns.append({"role": role, "content": text, "train": False})
        else:
            turns.append({"role": role, "content": text})
    return system, turns


def merge_turns(turns: list[dict], merged: Counter) -> list[dict]:
    """Join neighbours of the same speaker, with a newline between. One that is not to be trained leaves all untrained."""
    joined: list[dict] = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"]:
            joined[-1] = {**joined[-1], **turn, "content": joined[-1]["content"] + "\n" + turn["content"]}
            merged["turns"] += 1
        else:
            joined.append(turn)
    return joined


def check_turns(turns: list[dict], where: str):
    """Raises: UserError where they do not go from question to answer, or where nothing is to be trained.

    Before the first question may stand a greeting of the assistant, which is read and not trained.
    """
    for turn, before in zip(turns, [None, *turns]):
        if before and before["role"] == turn["role"]:
            raise UserError(
                f"{where}: two turns of the {turn['role']} in a row, {turn['content'][:20]!r} is the second: "
                "remove one, or join them with data_helper.py --conversations … --merge_turns"
            )
    if not turns or turns[-1]["role"] == "user":
        raise UserError(f"{where}: does not end on the assistant's turn: add the answer, or remove the question")
    if not any(map(is_trained, turns)):
        raise UserError(f'{where}: nothing is to be trained: every answer has "train": false: remove the sample')


def unsupervised(messages: list[dict]) -> list[dict]:
    """The same messages, of which no answer is trained or measured."""
    return [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in messages]


def first_question(messages: list[dict]) -> str:
    """What a conversation begins with, whatever greeting stands before it; its rounds and endings have it in common."""
    return next(turn["content"] for turn in messages if turn["role"] == "user")


def is_trained(turn: dict) -> bool:
    """Whether a turn is the assistant's and carries loss."""
    return turn["role"] == "assistant" and turn.get("train", True)


def with_system(system: str, messages: list[dict]) -> list[dict]:
    """The messages that `messages_to_ids` lays out; without a system text there is no system message."""
    return [{"role": "system", "content": system}, *messages] if system else messages


def conversation(system: str, prompt: str) -> list[dict]:
    """A question as a conversation, for `messages_to_ids`."""
    return with_system(system, [{"role": "user", "content": prompt}])


def rounds(sample: dict):
    """Yield (conversation up to a question, recorded answer) for every answer of a sample that is to be trained."""
    for number, turn in enumerate(sample["messages"]):
        if is_trained(turn):
            yield with_system(sample["system"], sample["messages"][:number]), turn["content"]


def split_off(samples: list[dict], share: float, seed: int) -> dict[str, list[dict]]:
    """Part samples into those for training and those for the test, drawn with `seed`.

    Samples that open with the same question stay together. At least one question is split off, and of each role at
    least one sample stays in training. Raises: UserError where that cannot be.
    """
    openings = [sample.get("prompt") or first_question(sample["messages"]) for sample in samples]
    groups = defaultdict(Counter)  # question → its samples, by role
    for sample, question in zip(samples, openings):
        groups[question][sample["role"]] += 1
    left, held_out = sum(groups.values(), Counter()), set()

    def dispensable(question):
        return all(left[role] > number for role, number in groups[question].items())

    sizes = [groups[question].total() for question in filter(dispensable, groups)]
    if not sizes:
        raise UserError("no role has a second question that could be set aside for the test: add one, or a test file")
    room = max(min(sizes), round(share * len(samples)))
    for question in sorted(groups, key=lambda question: random.Random(f"{seed} {question}").random()):
        if groups[question].total() <= room and dispensable(question):
            held_out.add(question)
            room -= groups[question].total()
            left -= groups[question]
    written = {"train": [], "test": []}
    for sample, question in zip(samples, openings):
        written["test" if question in held_out else "train"].append(sample)
    number = len(written["test"])
    print(f"no test file: {number:,} of {len(samples):,} samples are set aside, by their first question (--test_share)")
    return written


# ---------------------------------------------------------------- RoleBench's files


def read_rolebench(path: str | Path, characters: dict[str, dict] | None) -> list[dict]:
    """Read one RoleBench file, which may be empty: {"role", "question", "generated": [answer, …]} a line.

    Every role needs a profile, unless `characters` is None. Blank lines are skipped.

    Raises: UserError with every problem of every line.
    """
    rows, problems, strangers = [], Problems(), set()
    for where, row in read_records(path, problems):
        wrong, role = row_problems(row), row.get("role")
        if not wrong:
            role = row["role"] = composed(role)
        if not wrong and characters is not None and role not in characters and role not in strangers:
            strangers.add(role)  # told once a file, since a missing profile concerns hundreds of lines
            wrong = [f"the role {role[:20]!r} has no profile: correct the name, or add a profile to --desc_path"]
        problems += [f"{where}: {problem}" for problem in wrong]
        rows.append(row)
    if problems:
        raise UserError(*problems)
    return rows


def row_problems(row: dict) -> list[str]:
    """What is wrong with the object of one line. Keys that are not used here, such as "type", may hold anything."""
    texts = {'"role"': row.get("role"), '"question"': row.get("question")}
    answers, problems = row.get("generated"), []
    if isinstance(answers, list) and answers:
        texts |= {f'answer {number} of "generated"': answer for number, answer in enumerate(answers, start=1)}
    else:
        problems.append('"generated" is missing or holds no list of answers: write "generated": ["…"]')
    return problems + [f"{what} {problem}" for what, text in texts.items() if (problem := text_problem(text))]
