"""The device: which one computes, whether it can, and what a row costs there.

torch is imported where it is used, so that flags are read without it.
"""

import glob
import os

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


def row_cost(config, device):
    """A function: tokens of a row → what it costs, in tokens that pass through the linear layers.

    A layer takes 2 · (4 · hidden² + 3 · hidden · intermediate) operations a token, and 4 · hidden for each pair of tokens
    of a row, since a dense mask is computed everywhere. Operations on the mask are element by element, and so slower
    (measured on two CPU cores: four times). Every row costs a little by itself.
    """
    slowness = 4.0 if device.type == "cpu" else 2.0
    attention = slowness * 2 / (4 * config.hidden_size + 3 * config.intermediate_size)
    return lambda length: 32 + length + attention * length**2
