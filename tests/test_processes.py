"""Processes that train together: on two hosts, and without bfloat16."""

import multiprocessing
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, ROOT_USER, adapter_weights, scalars, users_environment

from support.training import processes
from tests.forked import free_port, run_to_the_end

# ---------------------------------------------------------------- precision


def asked_for(**kinds) -> dict:
    return {kind: {"enabled": kinds.get(kind, False)} for kind in ("bf16", "fp16")}


@pytest.mark.parametrize("device, fp16, dtype", [("cpu", False, "float32"), ("cuda", True, "float16")])
def test_without_bfloat16_training_falls_back_and_says_so(monkeypatch, capsys, device, fp16, dtype):
    """A GPU before Ampere emulates it, which DeepSpeed takes for having it."""

    class Accelerator:
        def device_name(self):
            return device

        def is_fp16_supported(self):
            return fp16

    processes.join_processes()
    capsys.readouterr()
    monkeypatch.setattr("deepspeed.get_accelerator", Accelerator)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    config = asked_for(bf16=True)
    assert processes.precision(config) == getattr(torch, dtype) and config == asked_for(fp16=fp16)
    assert capsys.readouterr().out == f"this device has no bfloat16; training in {dtype}\n"
    assert processes.precision(asked_for()) == torch.float32
    monkeypatch.setattr(processes, "has_bfloat16", lambda: True)
    assert processes.precision(asked_for(bf16=True)) == torch.bfloat16


# ---------------------------------------------------------------- what ends a run


def test_a_run_is_asked_to_stop_by_each_signal_that_is_not_ignored():
    before = {number: signal.getsignal(number) for number in processes.ENDING}
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2} == before.keys()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        for number in processes.ENDING:
            with processes.stop_requests() as asked_to_stop:
                assert asked_to_stop() is None
                os.kill(os.getpid(), number)
                assert asked_to_stop() == (None if number == signal.SIGHUP else number)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert all(signal.getsignal(number) == before[number] for number in before if number != signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])


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
        statuses, told = run_to_the_end("train.py", *train_arguments(tmp_path / "one", *flags), processes=2)
        assert statuses == [0, 0], told
        ours, theirs = (adapter_weights(tmp_path / name / "epoch-1-step-5") for name in ("two", "one"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and len(ours) == len(theirs)
        for curve in ("train_loss", "grad_norm", "ppl"):
            assert scalars(tmp_path / "two", curve) == scalars(tmp_path / "one", curve)


# ---------------------------------------------------------------- a GPU, as far as a machine without one can show it


def test_each_process_of_a_host_has_a_gpu_of_its_own(monkeypatch):
    class GPU:
        def device_name(self, number):
            return f"cuda:{number}"

        def set_device(self, number):
            self.device = number

    gpu = GPU()
    monkeypatch.setattr("deepspeed.get_accelerator", lambda: gpu)
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    for name, value in {"DS_ACCELERATOR": "cpu", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert processes.join_processes() == torch.device("cuda:1") and gpu.device == 1


def test_steps_are_laid_out_by_a_fork_whatever_the_default_is():
    """From Python 3.14 on it is a forkserver, to which all samples would be copied."""
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        assert list(processes.step_loader(["a", "b", "c"], 1, torch.device("cpu"))) == ["b", "c"]
    finally:
        multiprocessing.set_start_method(default, force=True)
