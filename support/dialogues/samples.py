"""Samples, in the forms that people have them, read as conversations.

{"role", "system", "prompt", "response"}              a question and its answer, as data_helper.py writes them
{"instruction", "input", "output"}                    the same with the book's keys; QUESTIONS lists all
{"role", "system", "messages": [{"role", "content"}]} a conversation; OpenAI's form has the system text in it
{"conversations": [{"from", "value"}]}                a conversation in ShareGPT's form
{"name", "is_user", "mes"} a line of a file           SillyTavern's log of one conversation
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path

from support.dialogues.json_files import check_kind, composed, filled, read_records, tell, text_problem
from support.errors import UserError, blaming

SPEAKERS = {"system": "system", "developer": "system", "user": "user", "human": "user"}  # in small letters
SPEAKERS |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant")
QUESTIONS = [  # the keys of a question with its answer: system text, question, answer, and rounds before them
    ("system", "prompt", "response", "history"),
    ("instruction", "input", "output"),  # the book's
    ("system", "input", "output"),
    ("system", "instruction", "output", "history"),  # Alpaca's, without an input
    ("system", "query", "response", "history"),  # ms-swift's
    ("system", "prompt", "completion"),  # TRL's
]
MARKS = {"train", "training", "loss", "weight", "kto_tag", "label"}  # keys of turns and of whole samples to be learned
YES = {"true": True, "yes": True, "1": True, "1.0": True, "false": False, "no": False, "0": False, "0.0": False}
NOT_TAKEN = {  # how a part of a key, or of a speaker, begins → why a turn or a sample that has it cannot be taken
    "chosen|reject": "belongs to pairs of a better and a worse answer: keep the better one, as messages",
    "(tools?|functions?|observation)(?![a-z])": "belongs to calls of tools, which are not learned here: remove the sample",
    "train(?!er)|learn(?!ing_rate)|loss|weight|mask|superv|kto": 'may say what is learned: say it with "train": true, false, or remove it',
}
HARMLESS = {*"role from content value name id index timestamp time date language type kind source category".split()}


def read_samples(path: str | Path, merge: bool = False, problems: list[str] | None = None) -> Iterator[dict]:
    """Yield the samples of a file, whatever their form, as {"role", "system", "messages"}.

    The messages are {"role": "user" | "assistant", "content": str}, in turn, from a question, or a greeting before it, to
    an answer; one that is not to be trained carries "train": False. "kind", of the question, stays where it is a text.

    `merge` joins neighbouring turns of one speaker. `problems` and what is raised: see `read_records`.
    """
    log, check = chat_log(path), partial(as_sample, merge=merge)
    records = [(path, check(log, f"{path}: its chat"))] if log else read_records(path, problems, check)
    yield from (sample for _, sample in records)


def as_sample(record: dict, where: str, merge: bool = False) -> dict:
    """Check one record and give it the keys that `read_samples` describes. Raises: UserError, which says where it stands."""
    record = filled(record)
    trained = is_marked_trained(record, where)
    system, turns = checked_turns(*given_turns(record, where), where, merge)
    if len(turns) < 2 or turns[-1]["role"] == "user":
        raise UserError(f"{where}: does not go from a question to an answer: add what lacks, or remove the sample")
    sample = {"role": composed(text_of(record, "role", where)), "system": system}
    sample["messages"] = turns if trained else unsupervised(turns)
    if isinstance(record.get("kind"), str):
        sample["kind"] = record["kind"]
    return sample


def text_of(record: dict, key: str, where: str) -> str:
    """The text that a record has under a key, or "". Raises: UserError."""
    if key in record and (problem := text_problem(record[key])):
        raise UserError(f'{where}: "{key}" {problem}')
    return record.get(key, "")


def is_marked_trained(fields: dict, where: str, speaker: str | None = None) -> bool:
    """Whether a sample, or a turn of `speaker`, is to be trained, as far as its keys say. Raises: UserError."""
    trained = True
    for key, value in ((key, value) for key, value in fields.items() if key.lower() not in HARMLESS):
        yes = YES.get(str(value).lower()) if key.lower() in MARKS else None
        for words, reason in NOT_TAKEN.items():
            if yes is None and re.search(f"(?i)(?<![a-z])({words})", key):
                raise UserError(f'{where}: "{key}" {reason}')
        if speaker and (yes is None or yes and speaker != "assistant"):
            file = re.sub("(:[0-9]+)?: .*", "", where)
            tell(f'{file}: "{key}" in turns of the {speaker} is not read: answers are learned unless "train" is false')
        trained &= yes is not False
    return trained


def given_turns(record: dict, where: str) -> tuple[str, list]:
    """The system text beside the turns of a record, and its turns, whatever they are. Raises: UserError."""
    turns, prompt = record.get("messages", record.get("conversations")), record.get("prompt")
    if turns is None and isinstance(prompt, list) and isinstance(record.get("completion"), list):
        prompt = [{**turn, "train": False} if isinstance(turn, dict) else turn for turn in prompt]
        turns = prompt + record["completion"]
    if turns is not None:
        return text_of(record, "system", where), turns if isinstance(turns, list) else [turns]
    given, history = {*chain(*QUESTIONS)} & record.keys(), record.get("history", [])
    is_pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    for keys in QUESTIONS:
        if {*keys[1:3]} <= given <= {*keys} and is_pairs:
            system, *pair = (text_of(record, key, where) for key in keys[:3])
            speakers = cycle(("user", "assistant"))
            return system, [{"role": role, "content": text} for role, text in zip(speakers, chain(*history, pair))]
    raise UserError(
        f'{where}: no sample has the keys ({", ".join(record)[:80]}): write "messages", or "prompt" and "response", or '
        "another form of data/README.md"
    )


def checked_turns(system: str, given: list, where: str, merge: bool) -> tuple[str, list[dict]]:
    """The system text, which stands beside the turns or begins them, and the turns as read. Raises: UserError.

    merge: neighbours of one speaker are joined, with a newline between; one that is not to be trained leaves all untrained.
    """
    turns = []
    for number, turn in enumerate(given, start=1):
        at = f"{where}: turn {number}"
        fields = filled(turn) if isinstance(turn, dict) else {}
        # Its own keys decide, not the name of the list: files mix the two forms.
        name, text = str(fields.get("role", fields.get("from"))), fields.get("content", fields.get("value"))
        with suppress(TypeError, KeyError):  # OpenAI's parts of text
            text = "\n".join(part["text"] for part in text) if isinstance(text, list) else text
        speaker = SPEAKERS.get(name.lower())
        trained = is_marked_trained(fields if speaker else {name: "", **fields}, at, speaker)
        if speaker == "system" and text is None:
            continue
        before = turns[-1] if turns else {"role": None}
        misplaced = (
            number > 1 or system not in ("", text) if speaker == "system" else speaker == before["role"] and not merge
        )
        if speaker is None or misplaced or text_problem(text):
            raise UserError(
                f"{at} cannot be {json.dumps(turn, ensure_ascii=False)[:80]}: write "
                '{"role": "user", "content": "…"} and "assistant" in turn, or join neighbours with data_helper.py '
                "--conversations … --merge_turns; a system text comes first, and once"
            )
        if speaker == "system":
            system = text
            continue
        message = {"role": speaker, "content": text}
        if speaker == "assistant" and not (turns and trained):
            message["train"] = False  # a greeting answers nothing
        if speaker == before["role"]:
            message = {**turns.pop(), **message, "content": f"{before['content']}\n{text}"}
        turns.append(message)
    return system, turns


def chat_log(path: str | Path) -> dict | None:
    """SillyTavern's log of one chat as a record, without its hidden lines; None: another file. Raises: UserError."""
    check_kind(path)
    with open(path, "rb") as file:
        if b'"is_user"' not in b"".join(islice(file, 2)):  # the first line is about the chat
            return None
    turns = []
    lines = [line for _, line in read_records(path) if "mes" in line and not line.get("is_system")]
    with blaming(f"{path}: is no log of a chat"):
        for line in lines:
            shown = dict(enumerate(line.get("swipes") or [])).get(line.get("swipe_id"), line["mes"])
            turns.append({"role": "user" if line.get("is_user") else "assistant", "content": shown})
        roles = {line.get("name") for line in lines if not line.get("is_user")}
    if len(roles) > 1:
        raise UserError(f"{path}: several characters speak, {', '.join(sorted(map(str, roles)))}: give each a file")
    return {"role": next(iter(roles), None), "messages": turns} if turns else None


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

    Samples that open with the same question stay together. One question is split off at least. Raises: UserError where a
    role would lose all its samples in training.
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
    if not test:
        raise UserError(
            f"no samples for the test file: of the {len(groups):,} questions that open the {len(samples):,} samples, "
            "training needs each: add samples that open otherwise, or name a file by --test_conversations"
        )
    print(f"no test file: {len(test):,} of {len(samples):,} samples set aside, by their first question (--test_share)")
    return {"train": [sample for sample in samples if opening(sample) not in held_out], "test": test}


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
