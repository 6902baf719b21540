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
    if not name.isdecimal():
        raise UserError(f"--device {name}: is no device: use cpu, auto or the number of a GPU")
    if int(name) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: CUDA finds {torch.cuda.device_count()} GPUs here: use --device cpu")
    return torch.device("cuda", int(name))


def refuse_unusable_gpu():
    """Raise UserError where an NVIDIA device is there and CUDA cannot use it, instead of computing on the CPU for days.

    Without such a device CUDA_VISIBLE_DEVICES does not matter, so that the book's command runs on a laptop.
    """
    import torch

    there = glob.glob("/dev/nvidia[0-9]*")  # none in a container that was given none, whatever its host has
    if not there or torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # the GPU is hidden on purpose
        return
    remedy = "to compute on the CPU, set DS_ACCELERATOR=cpu in the environment"  # CUDA_VISIBLE_DEVICES=-1 is no slot to the launcher
    if torch.version.cuda is None:
        raise UserError(
            f"there is an NVIDIA GPU, and this torch was built without CUDA: install torch with CUDA; {remedy}"
        )
    raise UserError(
        f"there is an NVIDIA GPU, and CUDA {torch.version.cuda} of this torch cannot use it: update the driver (580 or "
        f"newer for CUDA 13) or look at CUDA_VISIBLE_DEVICES; {remedy}"
    )


def set_up_cuda():
    """Switch cuDNN's attention off: it plans a kernel for every new row length, up to a second each; others need no plan.

    So rows need no padding to a few lengths. The kernels of linear layers want widths to be aligned, which are multiples
    of 64, and the mask begins its rows at multiples of 16 (`additive_mask`): padding would only add tokens.
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
