"""The models of one comparison: who they are, their weights, of one at a time, and their answers on disk."""

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from support.errors import blaming
from support.files import fingerprint, put_on_disk, whole_files
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
        return self._replace(output=beside(self.output, "attacks"))

    def check(self, four_bit: bool):
        """Raises: UserError with all that is wrong, before anything slow."""
        if self.server:
            return self.server.check()
        self.directory.check(four_bit)
        if self.adapter:
            read_adapter(self.directory, self.adapter)


def beside(output: Path, name: str) -> Path:
    return output.with_name(f"{output.stem}-{name}{output.suffix}")


def name_candidates(args) -> list[Candidate]:
    """By the arguments of predict.py; the baseline, where there is one, comes first."""
    candidates, output = [], args.output_path
    if args.baseline_path:
        candidates.append(Candidate("baseline", beside(output, "baseline"), ModelDirectory(args.baseline_path)))
    if args.engine:
        return [*candidates, Candidate("engine", output, server=Server(args.engine, args.engine_model))]
    base = ModelDirectory(args.model_path)
    if not args.adapter_path:
        return [*candidates, Candidate("model", output, base)]
    names = [path.resolve().name for path in args.adapter_path]
    if len({*names, "baseline"}) < len(names) + 1:  # some are the same: epoch-1-step-300 of two runs
        names = ["-".join(path.resolve().parts[1:]) for path in args.adapter_path]
    return candidates + [
        Candidate(name, beside(output, name), base, path) for name, path in zip(names, args.adapter_path)
    ]


class Loader:
    """loader(candidate) → its model on the device, in evaluation mode, until the next candidate's is asked for.

    Candidates that follow each other on one base, as adapters do, have its weights read once.
    """

    def __init__(self, device: torch.device, four_bit: bool = False):
        self.device, self.four_bit = device, four_bit
        self.path = self.adapter = self.model = None

    def __call__(self, candidate: Candidate):
        """A BaichuanForCausalLM or LlamaForCausalLM, or the PeftModel around it. Raises: UserError."""
        path, adapter = candidate.directory.path.resolve(), candidate.adapter
        if self.adapter and (path, adapter) != (self.path, self.adapter):
            self.model, self.adapter = self.model.unload(), None
        if path != self.path:
            self.path = self.model = None  # it makes room for what comes
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.model = candidate.directory.load(device=self.device, four_bit=self.four_bit).to(self.device)
            self.path = path
        if adapter != self.adapter:
            self.model = load_adapter(self.model, adapter).to(self.device).eval()
            self.adapter = adapter
        return self.model


# ---------------------------------------------------------------- answers on disk

FIRST = b'{"settings": '  # how such a file begins


def version_of(args, candidate: Candidate, questions: Sequence) -> dict:
    """Which answers a candidate's are: the settings that they depend on. A copied or renamed model gives the same ones.

    The batch size is left out, so that a run may go on with a smaller one.
    """
    directory, sources = candidate.directory, [json.dumps([question.messages for question in questions])]
    version = {"test": args.test_path.name, "max_new_tokens": args.max_new_tokens}
    version["sampling_seed"] = args.seed if args.sample else None
    if candidate.server:
        version |= {"engine": candidate.server.url, "model": candidate.server.model}
    else:
        version["model"] = f"{directory.fingerprint} {directory.weights.dtype}"
        sources.append((directory.path / "generation_config.json").read_text(encoding="utf-8"))
    if args.load_in_4bit:
        version["load_in_4bit"] = True
    if candidate.adapter:
        version["adapter"] = candidate.name
        sources.append(adapter_digest(candidate.adapter))
        sources.append((candidate.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return {**version, "digest": fingerprint("\n".join(sources))}


class Transcript:
    """JSON lines: first the version (`version_of`), then one answer a line, in the order of answering.

    They are written to `path`.part, which takes the name `path` once it holds all of them. Until then answers of another
    version stay. `changed` names what differs; the digest stands for questions, generation_config.json and adapter.

    Args:
        overwrite: answer anew, whatever the files hold.
    Attributes:
        answers: {number of the question: its answer}, as far as they are known from either file.
    """

    def __init__(self, path: Path, version: dict, questions: Sequence, overwrite: bool = False):
        self.path, self.part = path, path.with_name(f"{path.name}.part")
        self.version, self.questions, self.overwrite = version, questions, overwrite
        self.answers, self.changed, self.begun = {}, [], False
        for file in (self.path, self.part):
            old_version, answers = read_transcript(file)
            if old_version == version and not overwrite:
                self.answers, self.changed = self.answers | answers, []
            elif old_version and not (overwrite or self.answers):
                self.changed = [name for name in version | old_version if old_version.get(name) != version.get(name)]

    @property
    def complete(self) -> bool:
        return len(self.answers) == len(self.questions)

    def in_order(self) -> list[Answer]:
        return [self.answers[number] for number in range(len(self.questions))]

    def add(self, number: int, answer: Answer):
        """Write an answer down, with the role and the prompt of its question for who reads the file."""
        self.answers[number] = answer
        if self.begun:
            with open(self.part, "a", encoding="utf-8") as file:
                file.write(self._line(number))
        else:  # with those that were known, in whichever file
            if self.overwrite:
                self.path.unlink(missing_ok=True)  # a run without --overwrite goes on from this one
            with whole_files(self.part) as (file,):
                file.write(as_line({"settings": self.version}))
                file.writelines(map(self._line, self.answers))
            self.begun = True
        if self.complete:
            put_on_disk(self.part)
            self.part.replace(self.path)

    def _line(self, number: int) -> str:
        question, answer = self.questions[number], self.answers[number]
        line = {"question": number, "role": question.role, "prompt": question.prompt}
        return as_line({**line, "answer": answer.text, "stopped": answer.stopped})


def as_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_transcript(path: Path) -> tuple[dict | None, dict[int, Answer]]:
    """The version, None where there is none yet, and the answers by the number of the question.

    A last line that was cut off does not count. Raises: UserError: the file is something else.
    """
    records, lines = [], path.read_bytes().splitlines(keepends=True) if path.exists() else []
    with blaming(f"{path}: is no file of answers, so name another --output_path"):
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                is_cut_off = not line.endswith(b"\n")
                if not is_cut_off or not (records or FIRST.startswith(line[: len(FIRST)])):
                    raise
        version = dict(records.pop(0)["settings"]) if records else None
        return version, {record["question"]: Answer(record["answer"], record["stopped"]) for record in records}
