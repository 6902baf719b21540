"""Processes that train together: on two hosts, under the launcher, without bfloat16, and when one of them fails."""

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


@pytest.fixture
def bfloat16_file(tmp_path):
    """The project's DeepSpeed file; on a copy, since its precision is what changes here."""
    return shutil.copy(ROOT / "ds_zero2_no_offload.json", tmp_path)


@pytest.fixture
def accelerator(monkeypatch):
    """accelerator(bf16=…, fp16=…) makes DeepSpeed's accelerator say what it can do."""
    train.processes.join_processes()
    from deepspeed import get_accelerator

    def says(bf16: bool, fp16: bool):
        monkeypatch.setattr(type(get_accelerator()), "is_bf16_supported", lambda self: bf16)
        monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: fp16)

    return says


@pytest.mark.parametrize("fp16, dtype", [(False, torch.float32), (True, torch.float16)])
def test_without_bfloat16_training_falls_back_and_says_so(
    accelerator, train_arguments, bfloat16_file, tmp_path, capsys, fp16, dtype
):
    accelerator(bf16=False, fp16=fp16)
    rate = ["--learning_rate", 1e-2]
    train.main(train_arguments(tmp_path / "run", "--ds_file", bfloat16_file, "--sample_answers", 0, *rate))
    assert f"this device has no bfloat16; training in {str(dtype)[6:]}\n" in capsys.readouterr().out
    weights = adapter_weights(tmp_path / "run/epoch-1-step-5")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    losses = [value for _, value in scalars(tmp_path / "run", "train_loss")]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.1


def test_a_gpu_that_only_emulates_bfloat16_trains_in_float16(monkeypatch, capsys):
    class OldGPU:
        def device_name(self):
            return "cuda"

        def is_bf16_supported(self):  # as DeepSpeed sees it
            return True

        is_fp16_supported = is_bf16_supported

    monkeypatch.setattr("deepspeed.get_accelerator", OldGPU)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert processes.precision({"bf16": {"enabled": True}}) == torch.float16
    assert "training in float16" in capsys.readouterr().out


def test_overflow_in_float16_is_neither_nan_nor_a_step(accelerator, train_arguments, tmp_path, monkeypatch):
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
    accelerator(bf16=True, fp16=True)
    path = tmp_path / "float16.json"
    path.write_text(json.dumps(FLOAT32 | {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}}))
    train.main(train_arguments(tmp_path / "run", "--ds_file", path, "--sample_answers", 0, "--num_train_epochs", 2))
    assert overflows[0] and not overflows[-1]
    assert [step for step, _ in scalars(tmp_path / "run", "train_loss")] == list(range(1, 11))


# ---------------------------------------------------------------- the launcher's environment


@pytest.mark.parametrize("visible", ["0", ""])
def test_the_launcher_with_cuda_visible_devices(train_arguments, tmp_path, visible):
    """The README's line, on a machine with or without that GPU."""
    command = ["deepspeed", "--master_port", free_port(), "train.py", *train_arguments(tmp_path, "--sample_answers", 0)]
    printed = output_of(
        command, env=users_environment(CUDA_VISIBLE_DEVICES=visible, LOCAL_SIZE="1")
    )  # else a process a CPU socket
    assert "5 steps of 8 samples" in printed and "float32 on 1 ×" in printed
    assert (tmp_path / "epoch-1-step-5/adapter_model.safetensors").exists()


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

    def test_hosts_with_different_data_are_refused(hosts, train_arguments, few_samples, tmp_path):
        other = tmp_path / "train.json"
        other.write_text("".join(Path(few_samples[0]).read_text().splitlines(keepends=True)[::-1]))
        arguments = [train_arguments(tmp_path / "run"), train_arguments(tmp_path / "run", "--train_path", other)]
        for status, printed in run_on_hosts(hosts, tmp_path / "hostfile", arguments):
            assert status == 2 and "error: the processes differ in training data" in printed
        assert not (tmp_path / "run").exists()

    def test_hosts_without_a_common_output_directory_are_refused(hosts, train_arguments, tmp_path):
        arguments = [train_arguments(tmp_path / "one"), train_arguments(tmp_path / "two")]
        statuses, printed = zip(*run_on_hosts(hosts, tmp_path / "hostfile", arguments))
        assert statuses == (2, 2), printed
        assert f"error: {tmp_path / 'two'}: is not the directory that the first host writes to" in printed[1]
        assert "error: the connection to another process failed" in printed[0] and "Traceback" not in "".join(printed)
        assert not list((tmp_path / "two").iterdir())


# ---------------------------------------------------------------- a GPU, as far as a machine without one can show it


def test_a_gpu_named_by_its_uuid_is_refused_by_that_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6")
    with pytest.raises(UserError, match="by number alone"):
        processes.join_processes()


class GPU:
    """DeepSpeed's accelerator, on a machine without one."""

    def device_name(self, number=None):
        return "cuda" if number is None else f"cuda:{number}"

    def set_device(self, number):
        self.device = number


def test_no_compiler_is_looked_for_on_a_gpu(monkeypatch):
    """Even a look into `__compatible_ops__` would try every operation's compiler."""
    import deepspeed

    class Untouched(dict):
        def __setitem__(self, name, value):
            raise AssertionError(name)

        __getitem__ = get = __contains__ = __iter__ = __setitem__

    gpu = GPU()
    monkeypatch.setattr(deepspeed, "get_accelerator", lambda: gpu)
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", Untouched())
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert processes.join_processes() == torch.device("cuda:1") and gpu.device == 1


@pytest.mark.parametrize("error, ends", [(None, "destroyed"), (UserError("no"), "aborted")])
def test_an_error_under_nccl_does_not_wait_for_the_others(monkeypatch, error, ends):
    ended = []
    monkeypatch.setattr(processes, "failed", [])
    monkeypatch.setattr(processes.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: ended.append("destroyed"))
    monkeypatch.setattr(processes.dist.distributed_c10d, "_abort_process_group", lambda: ended.append("aborted"))
    try:
        with processes.one_line_for_each_end():
            if error:
                raise error
    except UserError:
        pass
    processes.leave_processes()
    assert ended == [ends]
