"""What a GPU will meet, as far as a machine without one can show it."""

from pathlib import Path

import pytest
import torch

from support import processes
from support.errors import UserError
from support.model_directory import pick_device


@pytest.fixture
def nvidia(monkeypatch):
    """A machine with an NVIDIA device that CUDA cannot use."""
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0" or exists(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


@pytest.mark.parametrize("version, remedy", [("13.0", "update the driver"), (None, "install torch with CUDA")])
def test_a_gpu_that_cuda_cannot_use_is_an_error(nvidia, monkeypatch, version, remedy):
    monkeypatch.setattr(torch.version, "cuda", version)
    for choose in (processes.join_processes, lambda: pick_device("auto")):
        with pytest.raises(UserError, match=remedy):
            choose()
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert pick_device("auto") == torch.device("cpu")


def test_a_laptop_takes_the_books_line(monkeypatch):
    if Path("/dev/nvidia0").exists():
        pytest.skip("has a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert pick_device("auto") == torch.device("cpu")


def test_cudnn_attention_is_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    pick_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
