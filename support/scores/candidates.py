"""The models of one comparison: who they are, and their weights, one directory at a time in memory."""

import gc
from pathlib import Path
from typing import NamedTuple

import torch

from support.adapter import read_adapter, refuse_misfit
from support.engine import Engine
from support.errors import UserError
from support.model_directory import ModelDirectory, load_adapter


class Candidate(NamedTuple):
    """One model of a comparison: of its own directory, or with an adapter on it, or behind a server."""

    name: str  # in the tables
    output: Path  # the file of its answers
    directory: ModelDirectory | None = None
    adapter: Path | None = None
    engine: Engine | None = None

    def attacked(self) -> "Candidate":
        """The same, with the file for its answers to the attacks."""
        return self._replace(output=self.output.with_name(f"{self.output.stem}-attacks{self.output.suffix}"))

    def check(self, four_bit: bool):
        """Raises: UserError with all that is wrong, before anything slow."""
        if self.engine:
            return self.engine.check()
        self.directory.check(four_bit)
        if self.adapter:
            refuse_misfit(self.directory, self.adapter, read_adapter(self.adapter))


def name_candidates(args) -> list[Candidate]:
    """The candidates that predict.py's flags name; the baseline, where there is one, comes first."""
    output = args.output_path

    def beside(name: str) -> Path:
        return output.with_name(f"{output.stem}-{name}{output.suffix}")

    candidates = []
    if args.baseline_path:
        candidates.append(Candidate("baseline", beside("baseline"), ModelDirectory(args.baseline_path)))
    if args.engine:
        return [*candidates, Candidate("engine", output, engine=Engine(args.engine, args.engine_model))]
    if not args.adapter_path:
        return [*candidates, Candidate("model", output, ModelDirectory(args.model_path))]
    names = [path.resolve().name for path in args.adapter_path]
    if len(set(names)) < len(names) or "baseline" in names:  # epoch-1-step-300 of two runs
        names = ["-".join(path.resolve().parts[-2:]) for path in args.adapter_path]
    if len(set(names)) < len(names):
        raise UserError("--adapter_path: names an adapter twice, or two whose paths end alike: name each one once")
    base = ModelDirectory(args.model_path)
    adapters = zip(names, args.adapter_path)
    return [*candidates, *(Candidate(name, beside(name), base, path) for name, path in adapters)]


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
