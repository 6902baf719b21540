"""The device: which one computes, whether it can, what it has free, and what a row costs there.

torch is imported where it is used, so that flags are read without it.
"""

import glob
import math
import os
from contextlib import suppress
from pathlib import Path

from support.errors import UserError

MOST_TOKENS = 8192  # of a row of trees at most, however little it would cost


def pick_device(name: str):
    """cpu, -1, auto or a GPU's number → the torch.device, which is there. Raises: UserError."""
    import torch

    set_up_cuda()
    if name in ("cpu", "-1"):
        return torch.device("cpu")
    refuse_unusable_gpu()
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if not name.isdecimal() or int(name) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"--device {name}: CUDA finds {count} GPUs here: use cpu, auto or the number of a GPU, from 0")
    return torch.device("cuda", int(name))


def refuse_unusable_gpu():
    """Raise UserError where an NVIDIA device is there and CUDA cannot use it, instead of computing on the CPU for days.

    Without such a device CUDA_VISIBLE_DEVICES does not matter, so that the book's command runs on a laptop.
    """
    import torch

    there = glob.glob("/dev/nvidia[0-9]*")  # none in a container that was given none, whatever its host has
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or os.environ.get("DS_ACCELERATOR") == "cpu"
    if there and not torch.cuda.is_available() and not hidden:
        remedy = f"update the driver to one for CUDA {torch.version.cuda}, or look at CUDA_VISIBLE_DEVICES"
        if torch.version.cuda is None:
            remedy = "install torch with CUDA, this one was built without it"
        on_cpu = "to compute on the CPU, set DS_ACCELERATOR=cpu in the environment"  # -1 is no slot to the launcher
        raise UserError(f"there is an NVIDIA GPU, and torch cannot use it: {remedy}; {on_cpu}")


def set_up_cuda():
    """Switch cuDNN's attention off: it plans a kernel for every new row length, up to a second each; others need no plan.

    So rows need no padding to a few lengths: the kernels of linear layers want widths to be aligned, which are multiples
    of 64, and the mask begins its rows at multiples of 16 (`additive_mask`).
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def free_memory(device) -> int:
    """Bytes that this process may still take on a device."""
    import psutil

    if device.type == "cpu":
        return min(psutil.virtual_memory().available + psutil.swap_memory().free, free_in_container())
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch's allocator
    return torch.cuda.mem_get_info(device)[0] + unused


# Of control groups, with which Linux bounds containers, of version 2 and 1: where they lie, the names of the bound and of
# what is used, and how the names begin of the pages of files therein, which make room.
CONTROL_GROUPS = {
    "": ("memory.max", "memory.current", ""),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


def free_in_container(mounted=Path("/sys/fs/cgroup"), mine=Path("/proc/self/cgroup")) -> float:
    """Bytes below the bounds of this process's control groups: its own and those around it; infinite where there is none."""
    free = math.inf
    for line in mine.read_text().splitlines() if mine.exists() else []:
        _, controllers, group = line.split(":", 2)
        most, used, files = CONTROL_GROUPS.get(controllers, CONTROL_GROUPS[""])
        innermost = mounted / controllers / group.lstrip("/")
        for directory in (innermost, *innermost.parents):  # a container may know its own group as the uppermost one
            with suppress(OSError, ValueError, KeyError):  # no such file, or the bound "max"
                pages = dict(entry.split() for entry in (directory / "memory.stat").read_text().splitlines())
                bound, usage = (int((directory / name).read_text()) for name in (most, used))
                of_files = sum(int(pages[f"{files}{kind}active_file"]) for kind in ("", "in"))
                free = min(free, bound - usage + of_files)
    return free


def row_cost(config, device):
    """A function: tokens of a row → what it costs, in tokens that pass through the linear layers.

    A layer takes 2 · (4 · hidden² + 3 · hidden · intermediate) operations a token, and 4 · hidden for each pair of tokens
    of a row, since a dense mask is computed everywhere. Operations on the mask are element by element, and so slower
    (measured on two CPU cores: four times). Every row costs a little by itself.
    """
    slowness = 4.0 if device.type == "cpu" else 2.0
    attention = slowness * 2 / (4 * config.hidden_size + 3 * config.intermediate_size)
    return lambda length: 32 + length + attention * length**2
