"""Machines other than the usual: several of them, none with bfloat16, odd paths, nothing to write to, no network.

README.md names the versions of Python that were tried.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FLOAT32, HAS_GPU, ROOT, ROOT_USER, adapter_weights, free_port, scalars

import train
from support.training import processes

BIN = Path(sys.executable).parent


def environment(**more) -> dict[str, str]:
    """This process's, without what conftest.py and training in this process set."""
    ours = ("HF_HUB_OFFLINE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    ours += () if HAS_GPU else ("DS_ACCELERATOR",)
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}"} | more


def run(command, **options) -> str:
    """The output of a command, which has to succeed."""
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


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
    printed = run(command, env=environment(CUDA_VISIBLE_DEVICES=visible, LOCAL_SIZE="1"))  # else a process a CPU socket
    assert "5 steps of 8 samples" in printed and "float32 on 1 ×" in printed
    assert (tmp_path / "epoch-1-step-5/adapter_model.safetensors").exists()


# ---------------------------------------------------------------- odd paths, a read-only home, no network

# Python runs this at its start: it writes down each attempt to look a name up or to reach another machine.
WATCH_NETWORK = """
import sys

def watch(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in (None, "", "localhost", "::1", "0.0.0.0") and not str(host).startswith("127."):
        with open({log!r}, "a") as file:
            file.write(f"{{sys.argv[:1]}} {{event}} {{host}}\\n")

sys.addaudithook(watch)
"""


def test_the_walk_in_an_odd_place(checkpoint, float32_ds_file, tmp_path, request):
    """Every script in a directory with spaces and Chinese characters, under a home that nothing can be written to.

    As root it has no network at all but the loopback; anywhere, no script tries to reach another machine.
    """
    place = tmp_path / "角色 扮演 (一)"
    home, log = tmp_path / "home", tmp_path / "network.log"
    for directory in (place, home, tmp_path / "site"):
        directory.mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(WATCH_NETWORK.format(log=str(log)), encoding="utf-8")
    model = shutil.copytree(checkpoint, place / "模型 7B")
    caches = {
        name: "" for name in ("HF_HOME", "XDG_CACHE_HOME", "TORCH_HOME", "TRITON_CACHE_DIR") if name in os.environ
    }
    env = environment(HOME=str(home), PYTHONPATH=str(tmp_path / "site"), **caches)
    for name in caches:
        del env[name]
    isolated = (
        ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "-"]
        if ROOT_USER and shutil.which("ip")
        else []
    )
    python = [*isolated, "python3"]
    train_path, test_path, merged = place / "train 训练.json", place / "test.json", place / "merged 合并"
    desc = ["--desc_path", ROOT / "data/sample/profiles-zh_desc.json"]
    try:
        if ROOT_USER:
            request.getfixturevalue("mount")(1 << 20, at=home)
            subprocess.run(["mount", "-o", "remount,ro", home], check=True)
        else:
            home.chmod(0o500)
        data = ["--data_dir", ROOT / "data/sample", "--train_path", train_path, "--test_path", test_path]
        run([*python, "data_helper.py", *data], env=env)
        flags = ["--model_name_or_path", model, "--train_path", train_path, "--test_path", test_path]
        flags += ["--ds_file", float32_ds_file, "--output_dir", place / "output dir", "--sample_answers", 1]
        flags += ["--gradient_accumulation_steps", 16]
        run([*isolated, "deepspeed", "--master_port", free_port(), "train.py", *flags], env=env)
        (adapter,) = (place / "output dir").glob("epoch-*")
        run(
            [*python, "merge_params.py", "--ori_model_dir", model, "--model_dir", adapter, "--save_model_dir", merged],
            env=env,
        )
        predict = ["--model_path", merged, "--test_path", test_path, "--output_path", place / "answers 回答.jsonl"]
        run([*python, "predict.py", *predict, "--max_new_tokens", 4, "--resamples", 1], env=env)
        run([*python, "web_demo.py", "--model_path", merged, *desc, "--ask", "你是谁？", "--role", "孙悟空"], env=env)
        page = [*python, "web_demo.py", "--model_path", merged, *desc, "--port", free_port()]
        with subprocess.Popen(list(map(str, page)), cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as serving:
            assert any("http://127.0.0.1" in line for line in serving.stdout)
            serving.terminate()
    finally:
        if not ROOT_USER:
            home.chmod(0o700)
    assert not log.exists(), log.read_text()
    assert not list(home.iterdir())


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
                env=environment(GLOO_SOCKET_IFNAME=interface),
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
        run([*one, *train_arguments(tmp_path / "one", *flags)], env=environment())
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


def test_the_versions_of_python_at_hand_compile_every_file():
    """Each that is installed at least reads the code."""
    versions = filter(None, (shutil.which(f"python3.{minor}") for minor in (11, 12, 13, 14)))
    sources = sorted(map(str, [*ROOT.glob("*.py"), *(ROOT / "baichuan").glob("*.py")]))
    check = (
        "import ast, json, sys\nfor path in json.load(sys.stdin): ast.parse(open(path, encoding='utf-8').read(), path)"
    )
    for python in versions:
        if subprocess.run([python, "--version"], capture_output=True).returncode:
            continue  # pyenv's name for one that is not chosen
        subprocess.run([python, "-c", check], input=json.dumps(sources), text=True, check=True)
