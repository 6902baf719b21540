"""Fixtures: a small random checkpoint under a real SentencePiece tokenizer, and the real RoleBench files where they are at hand."""

import ctypes
import glob
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

# The tests are of what a CPU can show, on a machine with a GPU, too; tests/tools/gpu_check.py shows the rest.
if HAS_GPU := bool(glob.glob("/dev/nvidia[0-9]*")):
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")  # the launcher sets the former anew
os.environ["HF_HUB_OFFLINE"] = "1"  # no test but that of --download, which sets its own hub, may look for a network
os.environ.update(NO_PROXY="127.0.0.1,localhost", no_proxy="127.0.0.1,localhost")  # where the tests' servers are
os.environ.pop("ALL_PROXY", os.environ.pop("all_proxy", None))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests run at a time; threads that wait for each other's spin

ROOT = Path(__file__).parent.parent
NAMESPACES = ["unshare", "--mount", "--net", "true"]
# May mount disks and make network namespaces; root in a container often may not.
ROOT_USER = os.geteuid() == 0 and subprocess.run(NAMESPACES, capture_output=True).returncode == 0
SHARED = ROOT.parent / "shared"  # RoleBench and the published tokenizer, beside the checkout of those who have them
NO_CHROMIUM = "no Chromium"


def pytest_terminal_summary(terminalreporter):
    """The last lines: which tests were not run, and how to get them."""
    if not ROOT_USER:
        terminalreporter.write_line(
            "not run: tests of full disks and of two hosts; they need root, and its right to unshare"
        )
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_CHROMIUM in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"not run: {len(skipped)} tests of the page in a browser; they need Chromium: "
            "apt-get install chromium fonts-noto-cjk, or python3 -m playwright install --with-deps chromium"
        )


@pytest.fixture(scope="session")
def checkpoint(samples, tmp_path_factory) -> str:
    """A directory in the published layout: random weights (hidden 64, 2 layers), tokenizer trained on the sample."""
    from support.model import stand_in

    directory = tmp_path_factory.mktemp("checkpoint") / "Baichuan2-random"
    sizes = ["--hidden_size", "64", "--num_hidden_layers", "2", "--vocab_size", "2000", "--steps", "0"]
    stand_in.main(["--save_dir", str(directory), "--train_path", samples[0], *sizes])
    return str(directory)


@pytest.fixture(scope="session")
def samples(tmp_path_factory) -> tuple[str, str]:
    """train.json and test.json of the sample's five roles."""
    import data_helper

    directory = tmp_path_factory.mktemp("samples")
    train, test = str(directory / "train.json"), str(directory / "test.json")
    sample = ["--data_dir", str(ROOT / "data/sample"), "--roles", "all"]
    data_helper.main([*sample, "--train_path", train, "--test_path", test])
    return train, test


@pytest.fixture(scope="session")
def few_samples(samples, tmp_path_factory) -> tuple[str, str]:
    """41 training and 5 test samples of all roles, for tests that need whole runs but not much training."""
    directory = tmp_path_factory.mktemp("few_samples")
    for path, every in ((samples[0], 5), (samples[1], 10)):
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        (directory / Path(path).name).write_text("".join(lines[::every]), encoding="utf-8")
    return str(directory / "train.json"), str(directory / "test.json")


@pytest.fixture(scope="session")
def own_mounts():
    """Give this process mounts of its own, which are gone when it and its children are, however they end."""
    new_mount_namespace = 0x00020000  # CLONE_NEWNS; os.unshare comes with Python 3.12
    if ctypes.CDLL(None, use_errno=True).unshare(new_mount_namespace):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


@pytest.fixture
def mount(own_mounts, tmp_path):
    """mount(size, at=None) → an empty disk of that many bytes, which other processes do not see; for root only."""
    disks = []

    def make(size: int, at: Path | None = None) -> Path:
        disk = at or tmp_path / f"disk-{len(disks)}"
        disk.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
        disks.append(disk)
        return disk

    yield make
    for disk in disks:
        subprocess.run(["umount", "-l", disk], check=True)


FLOAT32 = {
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    "gradient_clipping": 1.0,
}


@pytest.fixture(scope="session")
def float32_ds_file(tmp_path_factory) -> str:
    """The project's DeepSpeed configuration without half precision, for comparisons to many digits."""
    path = tmp_path_factory.mktemp("deepspeed") / "float32.json"
    path.write_text(json.dumps(FLOAT32))
    return str(path)


@pytest.fixture(scope="session")
def train_arguments(checkpoint, few_samples, float32_ds_file):
    """train_arguments(output_dir, "--flag", value, …) → argv: steps of 8 samples, 5 steps an epoch."""

    def arguments(output_dir, *more) -> list[str]:
        defaults = {
            **{"--model_name_or_path": checkpoint, "--train_path": few_samples[0], "--test_path": few_samples[1]},
            **{"--ds_file": float32_ds_file, "--output_dir": output_dir, "--show_loss_step": 1},
            **{"--lora_dropout": 0, "--learning_rate": 1e-3, "--max_len": 256, "--max_src_len": 128},
        }
        return [str(value) for pair in defaults.items() for value in pair] + [str(value) for value in more]

    return arguments


def scalars(output_dir, name: str) -> list[tuple[int, float]]:
    """(step, value) of a TensorBoard curve, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(output_dir) / "runs"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def alone() -> dict[str, str]:
    """The environment of a run of its own, without the ranks and ports of the runs in this process."""
    of_runs = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in of_runs}


def adapter_weights(directory) -> dict:
    from safetensors.torch import load_file

    return load_file(Path(directory) / "adapter_model.safetensors")


def labelled(data, index):
    """A sample of one round as other trainers lay it out: ids with the eos, and as many labels."""
    import numpy as np
    import torch

    ids, pairs = data.sample(index)
    ids = torch.from_numpy(np.append(ids, [data.eos] * int(pairs[-1, 0] == len(ids) - 1)))
    labels = torch.full_like(ids, -100)
    labels[pairs[:, 0] + 1] = torch.from_numpy(pairs[:, 1])
    return ids, labels


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
