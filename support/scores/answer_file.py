"""A model's answers to a test set on disk: an interrupted run goes on where its file ends."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from baichuan.generation_utils import Answer
from support.adapter import digest
from support.errors import UserError
from support.files import put_on_disk


def answer_settings(args, candidate, questions: Sequence) -> dict:
    """What a candidate's answers depend on. The batch size is left out, so that a run may go on with a smaller one."""
    model, sources = candidate.directory, [json.dumps([question.messages for question in questions])]
    settings = {"test": args.test_path.name, "max_new_tokens": args.max_new_tokens}
    settings["sampling_seed"] = args.seed if args.sample else None
    if candidate.engine:
        settings |= {"engine": candidate.engine.url, "model": candidate.engine.model}
    else:
        settings["model"] = model.path.resolve().name
        for file in [*model.weights.files, model.path / "generation_config.json"]:
            sources.append(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}")
    if args.load_in_4bit:
        settings["load_in_4bit"] = True
    if candidate.adapter:
        settings["adapter"] = candidate.name
        sources += [digest(candidate.adapter), (candidate.adapter / "adapter_config.json").read_text(encoding="utf-8")]
    return {**settings, "digest": hashlib.sha256("\n".join(sources).encode()).hexdigest()[:16]}


class AnswerFile:
    """JSON lines: first the settings that the answers depend on, then one answer a line, in the order of answering.

    They are written to `path`.part, which takes the name `path` once it holds all of them. Answers under other settings
    are replaced then, and `changed` says what differs.

    Args:
        overwrite: answer anew, whatever the files hold.
    Attributes:
        answers: {number of the question: its answer}, as far as they are known.
    Raises:
        UserError: the file is something else.
    """

    def __init__(self, path: Path, settings: dict, total: int, overwrite: bool = False):
        self.path, self.part = path, path.with_name(f"{path.name}.part")
        self.settings, self.total, self.overwrite = settings, total, overwrite
        self.answers, self.changed = {}, ""
        for file in (self.path, self.part):
            found, answers = read_answers(file)
            if overwrite or self.complete or found is None:
                continue
            if found == settings:
                self.answers, self.changed = answers, ""
            else:
                self.changed = differences(found, settings)

    @property
    def complete(self) -> bool:
        return len(self.answers) == self.total

    def in_order(self) -> list[Answer]:
        return [self.answers[number] for number in range(self.total)]

    @contextmanager
    def writing(self) -> Iterator[Callable]:
        """Yield add(number, what is said of the question, answer)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.part, "a" if self.answers else "w", encoding="utf-8") as file:

            def add(number: int, question: dict, answer: Answer):
                self.answers[number] = answer
                line = {"question": number, **question, "answer": answer.text, "stopped": answer.stopped}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()

            if self.overwrite:
                self.path.unlink(missing_ok=True)  # a run without --overwrite goes on from this one
            if not self.answers:
                file.write(json.dumps({"settings": self.settings}, ensure_ascii=False) + "\n")
            yield add
        put_on_disk(self.part)
        self.part.replace(self.path)


def differences(found: dict, settings: dict) -> str:
    """Which settings differ, in words. The digest stands for what has no name."""
    names = [name for name in {**settings, **found} if found.get(name) != settings.get(name)]
    told = [f"{name} {found.get(name)}, now {settings.get(name)}" for name in names if name != "digest"]
    return ", ".join(told) or "the weights, generation_config.json or the questions"


def read_answers(path: Path) -> tuple[dict | None, dict[int, Answer]]:
    """The settings, and the answers by the number of the question. A last line that was cut off is removed.

    Raises: UserError: the file is something else.
    """
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if not whole and (not data or data.startswith(b'{"settings"')):
        return None, {}
    try:
        first, *lines = whole.decode("utf-8").split("\n")[:-1]
        settings = dict(json.loads(first)["settings"])
        answers = {int(line["question"]): Answer(line["answer"], line["stopped"]) for line in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is no file of answers: name another --output_path") from None
    if len(whole) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return settings, answers
