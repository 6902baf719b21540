"""The models of one comparison: who they are, their weights, one directory at a time in memory, and their answers on disk."""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from support.errors import UserError
from support.files import fingerprint, put_on_disk
from support.model.adapter import adapter_digest, load_adapter, read_adapter
from support.model.answering import Answer
from support.model.directory import ModelDirectory
from support.model.server import Server


class Candidate(NamedTuple):
    """One model of a comparison: of its own directory, or with an adapter on it, or behind a server."""

    name: str  # in the table
    output: Path  # the file of its answers
    directory: ModelDirectory | None = None
    adapter: Path | None = None
    server: Server | None = None

    def attacked(self) -> "Candidate":
        """The same, with the file for its answers to the attacks."""
        return self._replace(output=self.output.with_name(f"{self.output.stem}-attacks{self.output.suffix}"))

    def check(self, four_bit: bool):
        """Raises: UserError with all that is wrong, before anything slow."""
        if self.server:
            return self.server.check()
        self.directory.check(four_bit)
        if self.adapter:
            read_adapter(self.directory, self.adapter)


def name_candidates(
    output: Path,
    model_path: Path | None,
    adapter_paths: Sequence[Path],
    baseline_path: Path | None,
    server: Server | None,
) -> list[Candidate]:
    """The candidates of a comparison; the baseline, where there is one, comes first.

    Args:
        output: the file of the model's answers; those of others are written beside it.
        model_path, adapter_paths, server: who answers: the model, each of the adapters on it, or a server.
    Raises:
        UserError: two adapters cannot be told apart by their names.
    """

    def beside(name: str) -> Path:
        return output.with_name(f"{output.stem}-{name}{output.suffix}")

    candidates = []
    if baseline_path:
        candidates.append(Candidate("baseline", beside("baseline"), ModelDirectory(baseline_path)))
    if server:
        return [*candidates, Candidate("engine", output, server=server)]
    if not adapter_paths:
        return [*candidates, Candidate("model", output, ModelDirectory(model_path))]
    names = [path.resolve().name for path in adapter_paths]
    if len(set(names)) < len(names) or "baseline" in names:  # epoch-1-step-300 of two runs
        names = ["-".join(path.resolve().parts[-2:]) for path in adapter_paths]
    if len(set(names)) < len(names):
        raise UserError("--adapter_path: names an adapter twice, or two whose paths end alike: name each one once")
    base = ModelDirectory(model_path)
    for name, path in zip(names, adapter_paths):
        candidates.append(Candidate(name, beside(name), base, path))
    return candidates


class Loader:
    """loader(candidate) → its model on the device, in evaluation mode, until the next candidate's is asked for.

    Candidates that follow each other on one base, as adapters do, have its weights read once.
    """

    def __init__(self, device: torch.device, four_bit: bool = False):
        self.device, self.four_bit = device, four_bit
        self.drop()

    def drop(self):
        self.path = self.base = self.adapter_path = self.adapter = None
        gc.collect()  # what was used makes room for what comes
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __call__(self, candidate: Candidate):
        """A BaichuanForCausalLM or LlamaForCausalLM, or the PeftModel around it. Raises: UserError."""
        path = candidate.directory.path.resolve()
        if self.adapter is not None and (path, candidate.adapter) != (self.path, self.adapter_path):
            self.base, self.adapter, self.adapter_path = self.adapter.unload(), None, None
        if path != self.path:
            self.drop()
            base = candidate.directory.load(four_bit_on=self.device if self.four_bit else None)
            self.path, self.base = path, base.to(self.device)
        if candidate.adapter and self.adapter is None:
            self.adapter = load_adapter(self.base, candidate.adapter).to(self.device).eval()
            self.adapter_path = candidate.adapter
        return self.base if self.adapter is None else self.adapter


# ---------------------------------------------------------------- answers on disk


def answer_settings(
    candidate: Candidate,
    questions: Sequence,
    test: str,
    max_new_tokens: int,
    sampling_seed: int | None,
    load_in_4bit: bool,
) -> dict:
    """What a candidate's answers depend on. The batch size is left out, so that a run may go on with a smaller one.

    test: the name of the test set's file. sampling_seed: None for greedy answers.
    """
    directory, sources = candidate.directory, [json.dumps([question.messages for question in questions])]
    settings = {"test": test, "max_new_tokens": max_new_tokens, "sampling_seed": sampling_seed}
    if candidate.server:
        settings |= {"engine": candidate.server.url, "model": candidate.server.model}
    else:
        settings["model"] = directory.path.resolve().name
        for file in [*directory.weights.files, directory.path / "generation_config.json"]:
            sources.append(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}")
    if load_in_4bit:
        settings["load_in_4bit"] = True
    if candidate.adapter:
        settings["adapter"] = candidate.name
        sources += [
            adapter_digest(candidate.adapter),
            (candidate.adapter / "adapter_config.json").read_text(encoding="utf-8"),
        ]
    return {**settings, "digest": fingerprint("\n".join(sources))}


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
