"""Processes that train together: on two hosts, and without bfloat16."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import FLOAT32, ROOT, ROOT_USER, adapter_weights, free_port, output_of, scalars, users_environment

import train
from support.errors import UserError
from support.training import processes

# ---------------------------------------------------------------- precision


def asked_for(**kinds) -> dict:
    return {kind: {"enabled": kinds.get(kind, False)} for kind in ("bf16", "fp16")}


@pytest.mark.parametrize("device, fp16, dtype", [("cpu", False, "float32"), ("cuda", True, "float16")])
def test_without_bfloat16_training_falls_back_and_says_so(monkeypatch, capsys, device, fp16, dtype):
    """A GPU before Ampere emulates it, which DeepSpeed takes for having it."""

    class Accelerator:
        def device_name(self):
            return device

        def is_bf16_supported(self):
            return device == "cuda"

        def is_fp16_supported(self):
            return fp16

    processes.join_processes()
    capsys.readouterr()
    monkeypatch.setattr("deepspeed.get_accelerator", Accelerator)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    config = asked_for(bf16=True)
    assert processes.precision(config) == getattr(torch, dtype) and config == asked_for(fp16=fp16)
    assert capsys.readouterr().out == f"this device has no bfloat16; training in {dtype}\n"
    assert processes.precision(asked_for()) == torch.float32
    monkeypatch.setattr(processes, "has_bfloat16", lambda: True)
    assert processes.precision(asked_for(bf16=True)) == torch.bfloat16


def test_overflow_in_float16_is_neither_nan_nor_a_step(train_arguments, tmp_path, monkeypatch):
    """A loss scale that is too high at first: DeepSpeed leaves steps out, and the run goes on."""
    overflows, update = [], train.update

    def watched(engine, dtype):
        trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        before = [parameter.detach().clone() for parameter in trained]
        norm = update(engine, dtype)
        overflows.append(bool(engine.optimizer.overflow))
        assert all(map(torch.equal, before, trained)) == overflows[-1]
        return norm

    monkeypatch.setattr(train, "update", watched)
    train.processes.join_processes()
    from deepspeed import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    path = tmp_path / "float16.json"
    path.write_text(json.dumps(FLOAT32 | {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}}))
    train.main(train_arguments(tmp_path / "run", "--ds_file", path, "--sample_answers", 0, "--num_train_epochs", 2))
    assert overflows[0] and not overflows[-1]
    assert [step for step, _ in scalars(tmp_path / "run", "train_loss")] == list(range(1, 11))


# ---------------------------------------------------------------- two hosts

if ROOT_USER and shutil.which("ip"):

    @pytest.fixture
    def hosts(mount):
        """Two network namespaces with a cable between them: [(name, interface, address)].

        Their names stand on a disk of this process's own, so that they are gone with it.
        """
        Path("/run/netns").mkdir(exist_ok=True)
        mount(1 << 20, at=Path("/run/netns"))
        pair = [(f"host{n}-{os.getpid()}", f"cable{n}", f"10.77.0.{n + 1}") for n in range(2)]

        def ip(*arguments):
            subprocess.run(["ip", *arguments], check=True)

        try:
            for name, _, _ in pair:
                ip("netns", "add", name)
            ip("link", "add", "cable0", "netns", pair[0][0], "type", "veth", "peer", "cable1", "netns", pair[1][0])
            for name, interface, address in pair:
                ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
                ip("-n", name, "link", "set", interface, "up")
                ip("-n", name, "link", "set", "lo", "up")
            yield pair
        finally:
            for name, _, _ in pair:
                subprocess.run(["ip", "netns", "delete", name])

    def run_on_hosts(hosts, hostfile, arguments) -> list[tuple[int, str]]:
        """The README's command on each host: its exit status and what it has printed."""
        hostfile.write_text("".join(f"{address} slots=1\n" for _, _, address in hosts))
        port = free_port()
        runs = [
            subprocess.Popen(
                list(map(str, ["ip", "netns", "exec", name, "deepspeed", "--hostfile", hostfile, "--no_ssh"]))
                + ["--node_rank", str(rank), "--master_addr", hosts[0][2], "--master_port", str(port), "train.py"]
                + list(map(str, arguments[rank])),
                cwd=ROOT,
                env=users_environment(GLOO_SOCKET_IFNAME=interface),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, (name, interface, _) in enumerate(hosts)
        ]
        try:
            printed = [run.communicate(timeout=600)[0] for run in runs]
        finally:
            for run in runs:
                run.terminate()  # the launcher ends what it has started
        return [(run.returncode, words) for run, words in zip(runs, printed)]

    def test_two_hosts_train_as_two_processes_of_one(hosts, train_arguments, tmp_path):
        flags = ["--gradient_accumulation_steps", 2, "--lora_dropout", 0.1, "--sample_answers", 0]
        arguments = train_arguments(tmp_path / "two", *flags)
        statuses, printed = zip(*run_on_hosts(hosts, tmp_path / "hostfile", [arguments, arguments]))
        assert statuses == (0, 0), printed
        assert "5 steps of 8 samples" in printed[0] and "steps of" not in printed[1]
        one = ["deepspeed", "--num_gpus", 2, "--master_port", free_port(), "train.py"]
        output_of([*one, *train_arguments(tmp_path / "one", *flags)], env=users_environment())
        ours, theirs = (adapter_weights(tmp_path / name / "epoch-1-step-5") for name in ("two", "one"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and len(ours) == len(theirs)
        for curve in ("train_loss", "grad_norm", "ppl"):
            assert scalars(tmp_path / "two", curve) == scalars(tmp_path / "one", curve)


# ---------------------------------------------------------------- a GPU, as far as a machine without one can show it


def test_a_gpu_named_by_its_uuid_is_refused_by_that_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6")
    with pytest.raises(UserError, match="by number alone"):
        processes.join_processes()


def test_each_process_of_a_host_has_a_gpu_of_its_own(monkeypatch):
    class GPU:
        def device_name(self, number=None):
            return "cuda" if number is None else f"cuda:{number}"

        def set_device(self, number):
            self.device = number

    gpu = GPU()
    monkeypatch.setattr("deepspeed.get_accelerator", lambda: gpu)
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    for name, value in {"DS_ACCELERATOR": "cpu", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert processes.join_processes() == torch.device("cuda:1") and gpu.device == 1
