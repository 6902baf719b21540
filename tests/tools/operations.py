"""The operations of one step of train.py, counted on the CPU: `python3 tests/tools/bench_train.py --operations`.

Each is a launch on a GPU. Where a step has few tokens, launching them can take longer than their arithmetic.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch

import train
from tests.tools.shared import write_model
from tests.tools.steps import training_step

# Views, and memory that is only allocated or looked at: no work for a GPU.
NO_WORK = "view _unsafe_view reshape _reshape_alias as_strided expand permute transpose t unbind select slice narrow "
NO_WORK += "split split_with_sizes chunk flatten unsqueeze squeeze detach detach_ alias view_as to lift_fresh set_ "
NO_WORK += "empty empty_like empty_strided resize_ result_type resolve_conj resolve_neg "
NO_WORK += "_has_compatible_shallow_copy_type"
NO_WORK = {"detach", "detach_", *(f"aten::{name}" for name in NO_WORK.split())}
# What a GPU has one kernel for, and one for its gradient, whatever the CPU makes of it …
FUSED = "rms_norm dropout native_dropout native_dropout_backward cross_entropy_loss "
FUSED += "_scaled_dot_product_flash_attention_for_cpu"
FUSED = {f"aten::{name}" for name in FUSED.split()}
# … and what converts a number on the CPU on its way.
SINGLE = {f"aten::{name}" for name in ("mul", "mul_", "add", "add_", "div", "div_", "pow", "sum", "mean")}


def count_operations(step: Callable) -> Counter:
    """{(part, operation): times} of a training step: operations that compute and call none that does.

    Parts are the names given to `torch.profiler.record_function`, and "backward" wherever autograd computes.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    found, fused = Counter(), {}  # autograd's number of each operation inside a fused one → the latter
    counted = set()  # fused operations, once the gradient of one is met

    def numbers(event):
        return {event.sequence_nr} | {number for child in event.cpu_children for number in numbers(child)}

    def visit(event, part: str) -> bool:
        """Count an event with those it calls; whether any of them computes."""
        part = event.name if event.is_user_annotation else part
        if event.name.startswith("autograd::engine::evaluate_function"):
            part = "backward"
            if event.sequence_nr in fused:
                kernel, first = fused[event.sequence_nr]
                found[part, f"{kernel} backward"] += (kernel, first) not in counted
                counted.add((kernel, first))
                # The sum of the gradients of a tensor that is used twice is no part of the kernel.
                found[part, "aten::add_"] += sum(child.name == "aten::add_" for child in event.cpu_children)
                return True
        elif event.name in FUSED:
            inside = numbers(event) - {-1}
            fused.update(dict.fromkeys(inside, (event.name, min(inside, default=-1))))
        inner = [] if event.name in FUSED | SINGLE else [visit(child, part) for child in event.cpu_children]
        works = not any(inner) and event.name.startswith("aten::") and event.name not in NO_WORK
        found[part, event.name] += works
        return works or any(inner)

    for event in profile.events():
        if event.cpu_parent is None:
            visit(event, "elsewhere")
    return +found


def operations_of_a_step(layers: int) -> Counter:
    """The book's flags, small widths, 8 samples in one row, in bfloat16."""
    with TemporaryDirectory() as directory:
        sizes = ("--hidden_size", 64, "--num_hidden_layers", layers, "--vocab_size", 2000)
        flags = ["--model_name_or_path", write_model(directory, *sizes), "--max_pack_len", "4096"]
        paths = ["--train_path", f"{directory}/train.json", "--test_path", f"{directory}/test.json"]
        with mock.patch.object(train, "row_cost", lambda config, device: None):  # as few rows as possible
            gather, update, steps = training_step([*flags, *paths, "--output_dir", str(Path(directory, "run"))])
        assert len(steps[0][0]) == 1
        update(gather(*steps[0]))  # the first one also makes the optimizer's state
        return count_operations(lambda: update(gather(*steps[0])))


def print_operations():
    found = operations_of_a_step(32)
    print(f"{found.total():,} operations in a step of 8 samples through 32 layers")
    for part in dict.fromkeys(part for part, _ in found):
        here = Counter({name: times for (where, name), times in found.items() if where == part})
        print(f"\n{part}: {here.total():,}")
        for name, times in here.most_common():
            print(f"{times:8,}  {name.removeprefix('aten::')}")
