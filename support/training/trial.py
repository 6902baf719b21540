"""Before the first step: does the run fit into memory and onto the disk, and about how long will it take?

The largest rows that the run will meet pass forward and backward through the model. They leave nothing behind.
"""

import time
from datetime import timedelta

import numpy as np
import psutil
import torch
import torch.distributed as dist

from support.command_line import said_if_slow
from support.device import free_memory
from support.errors import UserError
from support.files import free_bytes
from support.training.log import peak_memory_gb, reset_peak_memory
from support.training.processes import SAVES_MEMORY, is_main_process
from utils import Steps, evaluation, model_inputs

LOOKED_AT = 32  # steps of each kind that are laid out: all of a large file would take minutes


def try_largest_rows(args, engine, steps: Steps, test_rows: list[dict], done: int, dtype: torch.dtype):
    """Let the largest rows pass, and say what the run will take. No weight and no random number changes.

    test_rows: those of this process. done: steps that are behind; at least one is left. dtype: of the adapters.
    Raises: UserError, on every process, where the run does not fit on one of them.
    """
    model, device = engine.module, engine.device
    gpus = [device] if device.type == "cuda" else []
    reset_peak_memory()  # loading may have taken more
    with torch.random.fork_rng(gpus), said_if_slow("trying the largest rows, for the memory and time of the run"):
        rows, passes = largest_rows(steps, done)
        for row in (rows[0], rows[-1]):  # the first pass loads kernels, or compiles
            start = time.perf_counter()
            model(**model_inputs(row, device, args.attn_implementation), use_cache=False).loss.backward()
            if gpus:
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
        model.zero_grad()
        evaluation(model, largest(test_rows), device, args.attn_implementation)
    trained = model.get_nb_trainable_parameters()[0]
    moments = 0 if engine.optimizer.optimizer.state else 8 * trained / steps.world  # Adam's, which the first step makes
    if gpus:
        total, held = torch.cuda.mem_get_info(device)[1], torch.cuda.memory_allocated(device)
    else:
        process = psutil.Process().memory_info()
        total, held = psutil.virtual_memory().total, process.rss - process.shared
    available = held + free_memory(device)
    of_all = [None] * steps.world
    dist.all_gather_object(of_all, (1e9 * peak_memory_gb() + moments, total, available, seconds * passes))
    peak, total, available, seconds = max(of_all, key=lambda numbers: numbers[0] - numbers[2])
    if peak > available:
        needed = f"the run takes {in_bytes(peak)} of memory and may use {in_bytes(available)} on this device"
        raise UserError(f"{needed}: {SAVES_MEMORY}")
    if is_main_process():
        memory = f"peak {in_bytes(peak)} of {in_bytes(total)}"
        duration = f"{len(steps) - done:,} steps, about {timedelta(seconds=round(seconds))}"
        print(f"{memory}; {duration}; {disk_needed(trained, dtype.itemsize, steps, done, args)}")


def largest_rows(steps: Steps, done: int) -> tuple[list[dict], float]:
    """Of the steps after `done`: the `largest` rows, and how many passes of the longest one all will take together.

    They are looked for in the steps with the most tokens, each persona counted once, with the most supervised ones, and
    with the longest samples. The mean of all steps is that of some in between.
    """
    data, order = steps.data, steps.order[done:]
    persona_lengths, turn_lengths = np.array(list(map(len, data.personas))), np.diff(data.starts)  # in tokens
    persona = np.sort(data.persona[order], axis=1)
    is_first = np.diff(persona, axis=1, prepend=-1) > 0
    together = turn_lengths[order].sum(1) + (persona_lengths[persona] * is_first).sum(1)
    longest = (turn_lengths + persona_lengths[data.persona])[order].max(1)
    kinds = (together, longest, data.supervised[order].sum(1))
    chosen = {int(step) for kind in kinds for step in np.argsort(kind)[-LOOKED_AT:]}
    rows = largest([batch for step in sorted(chosen) for batch in steps[done + step][0]])

    def cost(batch) -> float:
        return len(batch["input_ids"]) * steps.collator.cost(batch["input_ids"].shape[1])

    some = np.linspace(done, len(steps) - 1, LOOKED_AT).astype(int)
    mean = sum(cost(batch) for step in some for batch in steps[int(step)][0]) / LOOKED_AT
    return rows, len(order) * mean / cost(rows[-1])


def largest(rows: list[dict]) -> list[dict]:
    """The row with the most supervised tokens, for the logits, and the longest one, for the layers; or the one that is both."""
    sizes = (lambda row: len(row["loss_positions"]), tokens)
    return list({id(row): row for size in sizes for row in sorted(rows, key=size)[-1:]}.values())


def tokens(batch: dict) -> int:
    return batch["input_ids"].numel()


def disk_needed(numbers: int, itemsize: int, steps: Steps, done: int, args) -> str:
    """What the adapters, of so many numbers, and the state will take."""
    every, limit = args.save_model_step or steps.steps_per_epoch, args.save_total_limit
    saves = sum(step % every == 0 or step % steps.steps_per_epoch == 0 for step in range(done + 1, len(steps) + 1))
    adapters = min(saves, (limit or saves) + 1)  # the best one besides
    adapter, state = numbers * itemsize, numbers * (itemsize + 12)
    free, needed = free_bytes(args.output_dir), adapters * adapter + 2 * state
    line = f"saves {in_bytes(adapter)} each, {in_bytes(needed)} in all on a disk with {in_bytes(free)} free"
    return line + (": too little, lower --save_total_limit" if needed > free else "")


def in_bytes(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:.2f} MB"
