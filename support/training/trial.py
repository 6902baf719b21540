"""Before the first step: does the run fit into memory and onto the disk, and about how long will it take?

One row, the largest that the run will meet, passes forward and backward through the model. It leaves nothing behind.
"""

import time
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist

from support.device import row_cost
from support.errors import UserError, out_of_memory
from support.files import free_bytes
from support.training.log import peak_memory_gb
from support.training.memory import (
    RowSize,
    Way,
    adapter_parameters,
    evaluation_bytes,
    held_bytes,
    remedy,
    row_bytes,
    weight_bytes,
)
from support.training.processes import first_problem
from utils import Steps, model_inputs

LOOKED_AT = 32  # steps that are laid out to find the largest row, and again for the mean


def device_memory(device: torch.device) -> tuple[int, int]:
    """(all of a device's memory, what this process may use of it), in bytes. A container's limit counts."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free + torch.cuda.memory_reserved(device)
    total, limit = psutil.virtual_memory().total, Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdecimal():
        total = min(total, int(text))
    return total, total


def row_of(batch: dict) -> RowSize:
    return RowSize(batch["input_ids"].numel(), len(batch["loss_positions"]), batch["input_ids"].shape[1])


def largest_batch(steps: Steps, done: int, size) -> dict[str, torch.Tensor]:
    """Of all batches of the steps after `done`, the one for which `size(row)` is largest.

    To lay every step out would take minutes for a large file. So of each step an upper bound is computed, as if all its
    samples were one row, and steps are laid out from the largest bound down, until it falls below the largest found.
    """
    data, collator = steps.data, steps.collator
    lengths, personas = np.diff(data.starts), np.array([len(persona) for persona in data.personas])
    whole = lengths + personas[data.persona]
    bounds = []  # (size at most, step)
    for epoch in range(done // steps.steps_per_epoch, steps.epochs):
        order = steps.order(epoch)  # (steps, samples)
        persona, supervised = np.sort(data.persona[order], axis=1), data.supervised[order].sum(1)
        if collator.packing == "none":
            length = whole[order].max(1)
            tokens = length * collator.rows_per_batch
        else:
            first = np.diff(persona, axis=1, prepend=-1) > 0  # each persona once
            length = tokens = np.minimum(
                lengths[order].sum(1) + (personas[persona] * first).sum(1),
                np.maximum(collator.max_pack_len, whole[order].max(1)),
            )
        rows = enumerate(zip(tokens.tolist(), supervised.tolist(), length.tolist()), epoch * steps.steps_per_epoch)
        bounds += [(size(RowSize(*row)), step) for step, row in rows if step >= done]
    found, largest = None, 0.0
    for bound, step in sorted(bounds, reverse=True)[:LOOKED_AT]:
        if bound <= largest:
            break
        for batch in steps[step][0]:
            if size(row_of(batch)) > largest:
                found, largest = batch, size(row_of(batch))
    return found


class Trial:
    """What a run will take, by arithmetic and then by a row that passes.

    Args:
        test_rows: those of this process, as evaluation takes them. done: steps that are behind.
        max_len: below which --max_pack_len may not go.
    """

    def __init__(
        self, config, way: Way, steps: Steps, test_rows: list[dict], done: int, max_len: int, device: torch.device
    ):
        self.config, self.way, self.steps, self.done = config, way._replace(processes=steps.world), steps, done
        self.max_len, self.device = max_len, device
        if done < len(steps):
            self.batch = largest_batch(steps, done, lambda row: row_bytes(config, self.way, row))
            self.row = row_of(self.batch)
            some = np.unique(np.linspace(done, len(steps) - 1, LOOKED_AT).astype(int))
            self.some_steps = [steps[int(step)][0] for step in some]
        self.evaluation_bytes, self.test_batch = 0, None  # of the largest test row
        for batch in test_rows:
            size = evaluation_bytes(config, self.way, row_of(batch))
            if size > self.evaluation_bytes:
                self.evaluation_bytes, self.test_batch = size, batch

    def too_large(self, available: float) -> str:
        """What is said where the run does not fit."""
        weights, rest = weight_bytes(self.config, self.way), held_bytes(self.config, self.way)
        shortest = self.max_len if self.steps.collator.packing == "tree" else None
        return (
            f"the run does not fit into the {available / 1e9:.3g} GB of {self.device.type} memory that it may use: "
            f"{weights / 1e9:.3g} GB of weights, {(rest - weights) / 1e9:.2g} GB for the adapters and "
            f"{row_bytes(self.config, self.way, self.row) / 1e9:.2g} GB for a row of {self.row.tokens:,} tokens: "
            + remedy(self.config, self.way, self.row, available, shortest)
        )

    def refuse_too_little_memory(self):
        """Before the weights are loaded. Raises: UserError on every process, where a device has less than they take."""
        if self.done == len(self.steps):
            return
        _, available = device_memory(self.device)
        problem = self.too_large(available) if held_bytes(self.config, self.way) > available else None
        if problem := first_problem(problem):
            raise UserError(problem)

    def run(self, engine, attn_implementation: str, compiled: bool) -> str | None:
        """Let the row pass, and say what the run will take. Gradients and random numbers are left as they were.

        Raises: UserError on every process, where it does not fit on one of them.
        """
        if self.done == len(self.steps):
            return None
        problem = seconds = None
        try:
            seconds = self._pass(engine.module, attn_implementation, compiled)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            problem = True
        total, available = device_memory(self.device)
        peak = self._peak(engine)
        if problem := first_problem(self.too_large(available) if problem or peak > available else None):
            raise UserError(problem)
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, (peak, seconds * self._passes_left()))
        peaks, times = zip(*found)
        return (
            f"peak {in_gb(max(peaks))} of {in_gb(total)} GB; {len(self.steps) - self.done:,} steps, "
            f"about {in_time(max(times))}"
        )

    def _pass(self, model, attn_implementation: str, compiled: bool) -> float:
        """Seconds of the row's forward and backward pass."""
        cuda = self.device.type == "cuda"
        short = min((batch for step in self.some_steps for batch in step), key=lambda batch: row_of(batch).tokens)
        with torch.random.fork_rng(devices=[self.device] if cuda else []):
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            try:
                # The first pass of all loads kernels; a row of another length may be compiled first.
                for batch in [short, self.batch, self.batch] if compiled else [short, self.batch]:
                    start = time.perf_counter()
                    inputs = model_inputs(batch, self.device, attn_implementation)
                    model(**inputs, use_cache=False, num_items_in_batch=1).loss.backward()
                    if cuda:
                        torch.cuda.synchronize(self.device)
                    seconds = time.perf_counter() - start
            finally:
                for parameter in model.parameters():
                    parameter.grad = None
        if self.evaluation_bytes > row_bytes(self.config, self.way, self.row):
            model.eval()
            with torch.no_grad():
                inputs = model_inputs(self.test_batch, self.device, attn_implementation)
                model(**inputs, use_cache=False, num_items_in_batch=1)
            model.train()
        return seconds

    def _peak(self, engine) -> float:
        """Bytes: the most so far, and the optimizer's moments, which its first step makes."""
        moments = 0 if engine.optimizer.optimizer.state else 8 * adapter_parameters(self.config, self.way.rank)
        return 1e9 * peak_memory_gb() + moments / self.way.processes

    def _passes_left(self) -> float:
        """How many times the cost of the row the steps that are left will take."""
        cost = row_cost(self.config, self.device)

        def cost_of(batch) -> float:
            return len(batch["input_ids"]) * cost(batch["input_ids"].shape[1])

        left = len(self.steps) - self.done
        mean = sum(cost_of(batch) for step in self.some_steps for batch in step) / len(self.some_steps)
        return left * mean / cost_of(self.batch)

    def saves(self, output_dir: Path, save_model_step: int, save_total_limit: int | None) -> str:
        """What the adapters and the state will take of the disk."""
        numbers = adapter_parameters(self.config, self.way.rank)
        times = 0
        for step in range(self.done + 1, len(self.steps) + 1):
            ends_epoch = step % self.steps.steps_per_epoch == 0
            times += ends_epoch or (save_model_step > 0 and step % save_model_step == 0)
        kept = min(times, (save_total_limit or times) + 1)  # the best one besides
        each, state = numbers * self.way.itemsize, numbers * (self.way.itemsize + 12)
        free, needed = free_bytes(output_dir), kept * each + 2 * state
        told = f"saves {in_bytes(each)} each, {in_bytes(needed)} in all on a disk with {in_bytes(free)} free"
        return told + (": too little, lower --save_total_limit" if needed > free else "")


def in_gb(number: float) -> str:
    return f"{number / 1e9:,.0f}" if number >= 1e12 else f"{number / 1e9:.3g}"


def in_bytes(number: float) -> str:
    return f"{in_gb(number)} GB" if number >= 1e8 else f"{number / 1e6:.2g} MB"


def in_time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
