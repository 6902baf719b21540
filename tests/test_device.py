"""The device that is chosen, and what is said of a GPU that cannot be used, as far as a machine without one can show it."""

import pytest
import torch

from support.device import pick_device
from support.errors import UserError
from support.training import processes


@pytest.fixture
def nvidia(monkeypatch):
    """A machine with an NVIDIA device that CUDA cannot use."""
    monkeypatch.setattr("glob.glob", lambda pattern: ["/dev/nvidia3"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


@pytest.mark.parametrize("version, remedy", [("13.0", "update the driver"), (None, "install torch with CUDA")])
def test_a_gpu_that_cuda_cannot_use_is_an_error(nvidia, monkeypatch, version, remedy):
    monkeypatch.setattr(torch.version, "cuda", version)
    for choose in (processes.join_processes, lambda: pick_device("auto"), lambda: pick_device("0")):
        with pytest.raises(UserError, match=f"{remedy}.*; to compute on the CPU, set DS_ACCELERATOR=cpu"):
            choose()
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert pick_device("auto") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # the remedy
    assert pick_device("auto") == torch.device("cpu") == processes.join_processes()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for wrong in ("0", "gpu"):
        with pytest.raises(UserError, match=f"--device {wrong}: CUDA finds 0 GPUs here"):
            pick_device(wrong)


def test_a_laptop_takes_the_books_line(monkeypatch):
    monkeypatch.setattr("glob.glob", lambda pattern: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert pick_device("auto") == torch.device("cpu")


def test_cudnn_attention_is_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    pick_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
