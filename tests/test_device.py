"""The device that is chosen, and what is said of a GPU that cannot be used, as far as a machine without one can show it."""

from types import SimpleNamespace

import pytest
import torch

from support.device import free_in_container, free_memory, pick_device, row_cost
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


@pytest.mark.parametrize("version, files", [(2, ("max", "current", "")), (1, ("limit", "usage", "total_"))])
def test_a_container_has_less_memory_than_its_host(tmp_path, version, files):
    """The group of the process, or one around it, is bounded; pages of files make room."""
    most, used, pages = files
    most, used = (f"memory.{name}" + ("_in_bytes" if version == 1 else "") for name in (most, used))
    (tmp_path / "mine").write_text("0::/pod/job\n" if version == 2 else "9:cpu:/x\n4:memory:/pod/job\n0::/\n")
    mounted = tmp_path / "fs"
    pod = mounted / ("memory" if version == 1 else "") / "pod"

    def bound(directory, limit, taken):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.stat").write_text(f"anon 5\n{pages}active_file 100\n{pages}inactive_file 200\n")
        (directory / most).write_text(f"{limit}\n")
        (directory / used).write_text(f"{taken}\n")

    def free():
        return free_in_container(mounted, tmp_path / "mine")

    assert free() == float("inf")
    bound(pod, "max" if version == 2 else 2**62, 5000)
    assert free() > 2**61
    bound(pod, 10_000, 5000)
    assert free() == 5300
    bound(pod / "job", 2000, 1000)
    assert free() == 1300
    assert free_in_container(mounted, tmp_path / "none") == float("inf")
    assert 0 < free_memory(torch.device("cpu")) <= free_in_container()


def test_free_memory_is_what_the_host_and_the_container_allow(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100, total=1000))
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(free=20))
    for bound, free in ((float("inf"), 120), (70, 70)):
        monkeypatch.setattr("support.device.free_in_container", lambda bound=bound: bound)
        assert free_memory(torch.device("cpu")) == free


@pytest.mark.parametrize("device, slowness", [("cpu", 4), ("cuda", 2)])
def test_the_cost_of_a_row_is_that_of_its_operations(device, slowness):
    """At the sizes of 7B, in operations of the linear layers on a token."""
    hidden, intermediate = 4096, 11_008
    linear, pair = 2 * (4 * hidden**2 + 3 * hidden * intermediate), 4 * hidden
    cost = row_cost(SimpleNamespace(hidden_size=hidden, intermediate_size=intermediate), torch.device(device))
    assert cost(3000) == pytest.approx(32 + 3000 + slowness * pair * 3000**2 / linear)


def test_cudnn_attention_is_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    pick_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
