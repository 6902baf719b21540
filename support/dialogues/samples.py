"""Samples, in the forms that people have them, read as conversations.

{"role", "system", "prompt", "response"}              a question and its answer, as data_helper.py writes them
{"instruction", "input", "output"}                    the same with the book's keys
{"role", "system", "messages": [{"role", "content"}]} a conversation; OpenAI's form has the system text in it
{"conversations": [{"from", "value"}]}                a conversation in ShareGPT's form
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from support.dialogues.json_files import composed, filled, read_records, text_problem
from support.errors import UserError

SPEAKERS = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
QUESTIONS = [  # the keys that a question with its answer may have: of the system text, the question and the answer
    ("system", "prompt", "response"),
    ("instruction", "input", "output"),  # the book's
    ("system", "input", "output"),
    ("system", "instruction", "output"),  # Alpaca's, without an input
]


def read_samples(path: str | Path, merge: bool = False, problems: list[str] | None = None) -> Iterator[dict]:
    """Yield the samples of a file, whatever their form, as {"role", "system", "messages"}.

    The messages are {"role": "user" | "assistant", "content": str}, in turn, from a question, or a greeting before it, to
    an answer; one that is not to be trained carries "train": False. "kind", of the question, stays where it is a text.

    `merge` joins neighbouring turns of one speaker. `problems` and what is raised: see `read_records`.
    """
    return (sample for _, sample in read_records(path, problems, partial(as_sample, merge=merge)))


def as_sample(record: dict, where: str, merge: bool = False) -> dict:
    """Check one record and give it the keys that `read_samples` describes. Raises: UserError, which says where it stands."""
    record = filled(record)
    system, turns = conversation_of(record, where, merge) or question_of(record, where)
    if not turns or turns[-1]["role"] == "user" or not any(map(is_trained, turns)):
        raise UserError(f"{where}: does not end on an answer, or trains none: add one, or remove the sample")
    sample = {"role": composed(text_of(record, "role", where)), "system": system, "messages": turns}
    if isinstance(record.get("kind"), str):
        sample["kind"] = record["kind"]
    return sample


def text_of(record: dict, key: str, where: str) -> str:
    """The text that a record has under a key, or "". Raises: UserError."""
    if key in record and (problem := text_problem(record[key])):
        raise UserError(f'{where}: "{key}" {problem}')
    return record.get(key, "")


def conversation_of(record: dict, where: str, merge: bool) -> tuple[str, list[dict]] | None:
    """The system text and the turns of a conversation; None where the record holds none. Raises: UserError.

    merge: neighbours of one speaker are joined, with a newline between; one that is not to be trained leaves all untrained.
    """
    given = record.get("messages", record.get("conversations"))
    if given is None:
        return None
    system, turns = text_of(record, "system", where), []
    for number, turn in enumerate(given if isinstance(given, list) else [given], start=1):
        fields = filled(turn) if isinstance(turn, dict) else {}
        # Its own keys decide, not the name of the list: files mix the two forms.
        speaker = SPEAKERS.get(str(fields.get("role", fields.get("from"))))
        text, train = fields.get("content", fields.get("value")), fields.get("train", True)
        if speaker == "system" and text is None:
            continue
        before = turns[-1] if turns else {"role": None}
        misplaced = speaker == before["role"] and not merge or speaker == "system" and (system or number > 1)
        if speaker is None or misplaced or text_problem(text) or not isinstance(train, bool):
            raise UserError(
                f"{where}: turn {number} cannot be {json.dumps(turn, ensure_ascii=False)[:80]}: write "
                '{"role": "user", "content": "…"} and "assistant" in turn, or join neighbours with data_helper.py '
                "--conversations … --merge_turns; a system text comes first, and once"
            )
        if speaker == "system":
            system = text
            continue
        said = {"role": speaker, "content": text}
        if speaker == "assistant" and not (turns and train and fields.get("weight", 1)):
            said["train"] = False  # OpenAI's weight 0 means the same; and a greeting answers nothing
        if speaker == before["role"]:
            said = {**turns.pop(), **said, "content": f"{before['content']}\n{text}"}
        turns.append(said)
    return system, turns


def question_of(record: dict, where: str) -> tuple[str, list[dict]]:
    """The system text and the two turns of a question with its answer. Raises: UserError."""
    given = {"history", *chain(*QUESTIONS)} & record.keys()
    for keys in QUESTIONS:
        if {*keys[1:]} <= given <= {*keys}:
            system, prompt, response = (text_of(record, key, where) for key in keys)
            return system, [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    raise UserError(
        f'{where}: no sample has the keys ({", ".join(record)[:80]}): write "messages", or "prompt" and "response", or '
        "another form of data/README.md"
    )


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

    Samples that open with the same question stay together. One question is split off at least, unless a role would lose
    all its samples in training.
    """

    def opening(sample):
        return sample.get("prompt") or first_question(sample["messages"])

    groups = defaultdict(Counter)  # question → its samples, by role
    for sample in samples:
        groups[opening(sample)][sample["role"]] += 1
    left, held_out = Counter(sample["role"] for sample in samples), set()

    def dispensable(question):
        return all(left[role] > number for role, number in groups[question].items())

    sizes = [groups[question].total() for question in filter(dispensable, groups)]
    room = max(min(sizes, default=0), round(share * len(samples)))
    for question in sorted(groups, key=lambda question: random.Random(f"{seed} {question}").random()):
        if groups[question].total() <= room and dispensable(question):
            held_out.add(question)
            room -= groups[question].total()
            left -= groups[question]
    test = [sample for sample in samples if opening(sample) in held_out]
    print(f"no test file: {len(test):,} of {len(samples):,} samples set aside, by their first question (--test_share)")
    return {"train": [sample for sample in samples if opening(sample) not in held_out], "test": test}


# ---------------------------------------------------------------- RoleBench's files


def read_rolebench(path: str | Path, problems: list[str] | None = None) -> list[dict]:
    """Read a RoleBench file, which may be empty: {"role", "question", "generated": [answer, …]} a line, and keys not used here.

    `problems` and what is raised: see `read_records`.
    """
    return [row for _, row in read_records(path, problems, as_question)]


def as_question(row: dict, where: str) -> dict:
    answers = row.get("generated")
    texts = [row.get("role"), row.get("question"), *(answers if isinstance(answers, list) else [])]
    if len(texts) < 3 or any(map(text_problem, texts)):
        wanted = '{"role": "李白", "question": "…", "generated": ["…", "…"]}'
        raise UserError(f"{where}: is no question with its answers: write {wanted}, with text in each of them")
    return {**row, "role": composed(row["role"])}
