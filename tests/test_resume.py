"""A run that is killed, stopped or out of disk loses nothing: resumed, it ends as if nothing had happened, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, ROOT_USER, adapter_weights, free_port, scalars

import train
from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from support.resume import checkpoints

LAUNCHER = str(Path(sys.executable).parent / "deepspeed")
ALONE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STEPS = 20
# Two epochs of ten steps with dropout; saved in the middle of a mean over three steps, and at the ends of the epochs.
FLAGS = ["--per_device_train_batch_size", 10, "--num_train_epochs", 2]
FLAGS += ["--lora_dropout", 0.1, "--save_model_step", 4, "--save_total_limit", 3, "--sample_answers", 0]


def start(arguments, processes: int = 1, killer: tuple[int, int, Path] | None = None) -> subprocess.Popen:
    """train.py in a process group of its own. killer: (process, operation, path) for killed_at.py."""
    command = ["tests/killed_at.py", *arguments, *killer] if killer else ["train.py", *arguments]
    launcher = [LAUNCHER, "--num_gpus", processes, "--master_port", free_port()] if processes > 1 else [sys.executable]
    return subprocess.Popen(
        [str(part) for part in launcher + command],
        cwd=ROOT,
        env=alone() | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def alone() -> dict[str, str]:
    """The environment without the ranks and ports of the runs in this process."""
    return {name: value for name, value in os.environ.items() if name not in ALONE}


def read_until(run: subprocess.Popen, text: str) -> str:
    """What a run prints up to the line that holds `text`, which it waits for."""
    lines = []
    for line in run.stdout:
        lines.append(line)
        if text in line:
            break
    else:
        pytest.fail(f"ended without {text!r}:\n{''.join(lines)}")
    return "".join(lines)


def finish(run: subprocess.Popen) -> str:
    output, _ = run.communicate(timeout=300)  # until the last process of the group has closed its end
    return output


@pytest.fixture(scope="module")
def run_arguments(train_arguments):
    def arguments(output, *more, processes=1):
        share = ["--gradient_accumulation_steps", 2 // processes]
        return train_arguments(output, *FLAGS, *share, "--show_loss_step", 3, *more)

    return arguments


@pytest.fixture(scope="module")
def uninterrupted(run_arguments, tmp_path_factory):
    """uninterrupted(processes) → the output directory of a run that nothing happened to."""
    known = {}

    def run(processes):
        if processes not in known:
            known[processes] = tmp_path_factory.mktemp("uninterrupted") / "run"
            output = finish(start(run_arguments(known[processes], processes=processes), processes))
            assert (known[processes] / "epoch-2-step-20").is_dir(), output
        return known[processes]

    return run


CURVES = ("train_loss", "learning_rate", "grad_norm", "ppl", "test_loss")


def assert_same(output, expected):
    """Adapters to the last bit, the whole of every curve, and nothing else left behind."""
    kept = [path.name for _, path in checkpoints(expected)]
    assert kept == ["epoch-2-step-12", "epoch-2-step-16", "epoch-2-step-20"]
    assert [path.name for _, path in checkpoints(output)] == kept
    for name in kept:
        ours, theirs = adapter_weights(output / name), adapter_weights(expected / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    for name in CURVES:
        assert scalars(output, name) == scalars(expected, name), name
    assert [step for step, _ in scalars(output, "train_loss")] == list(range(3, STEPS + 1, 3))
    assert [step for step, _ in scalars(output, "ppl")] == [4, 8, 10, 12, 16, 20]
    assert [path.name for _, path in checkpoints(output / "state")] == ["epoch-2-step-20"]
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp")]


def resume_to_the_end(arguments, output, processes=1) -> str:
    printed = finish(start([*arguments, "--resume"], processes))
    assert (output / "state/epoch-2-step-20").is_dir(), printed
    return printed


def count_operations(run_arguments, tmp_path) -> int:
    printed = finish(start(run_arguments(tmp_path / "count"), killer=(0, 0, tmp_path / "count")))
    return int(printed.split("operations ")[1])


def assert_none_is_partial(output):
    """What goes by the name of an adapter or a state can be used, whenever one looks."""
    for _, adapter in checkpoints(output):
        assert adapter_weights(adapter) and json.loads((adapter / "adapter_config.json").read_text()), adapter
        assert BaichuanTokenizer.from_pretrained(adapter).text_to_ids("俺老孙")
    for _, state in checkpoints(output / "state"):
        assert json.loads((state / "run.json").read_text())["identity"]
        assert torch.load(state / "process-0.pt", weights_only=True)["schedule"]


# ---------------------------------------------------------------- killed


def killed_at_operations(run_arguments, output, operations) -> int:
    """Kill a run and its resumed successors before the given operations, counted from each start; how many kills."""
    kills = 0
    for operation in operations:
        resume = ["--resume"] if output.exists() else []
        run = start([*run_arguments(output), *resume], killer=(0, operation, output))
        printed = finish(run)
        kills += run.returncode == -signal.SIGKILL
        assert run.returncode in (0, -signal.SIGKILL), printed
        assert_none_is_partial(output)
    return kills


def killed_at_random_moments(run_arguments, output, processes, kills, seed) -> int:
    """Kill all processes at once some time after training has begun, and resume; how often it was still running."""
    draw, killed = random.Random(seed), 0
    for _ in range(kills):
        resume = ["--resume"] if output.exists() else []
        run = start([*run_arguments(output, processes=processes), *resume], processes)
        read_until(run, "steps of 20 samples")
        time.sleep(draw.uniform(0, 1.5))  # the moment is the test's input; what it finds does not depend on it
        os.killpg(run.pid, signal.SIGKILL)
        finish(run)
        killed += run.returncode == -signal.SIGKILL
        assert_none_is_partial(output)
    return killed


def test_killed_in_the_middle_of_saves(run_arguments, uninterrupted, tmp_path):
    output = tmp_path / "run"
    assert killed_at_operations(run_arguments, output, [47, 90]) == 2
    assert killed_at_random_moments(run_arguments, output, 1, 1, seed=0) == 1
    printed = resume_to_the_end(run_arguments(output), output)
    assert "going on from" in printed
    assert_same(output, uninterrupted(1))


@pytest.mark.slow
def test_killed_at_any_file_operation(run_arguments, uninterrupted, tmp_path):
    """Operations spread over a whole run, so that each kind is met: adapter, state, renames, removal of older ones."""
    total = count_operations(run_arguments, tmp_path)
    draw, kills = random.Random(1), 0
    for number in range(8):
        output = tmp_path / f"run-{number}"
        first = draw.randrange(total * number // 8, total * (number + 1) // 8) + 1
        kills += killed_at_operations(run_arguments, output, [first, draw.randrange(total // 8) + 1])
        resume_to_the_end(run_arguments(output), output)
        assert_same(output, uninterrupted(1))
    assert kills >= 12


@pytest.mark.slow
@pytest.mark.parametrize("processes, kills", [(1, 8), (2, 8)])
def test_killed_at_random_moments(run_arguments, uninterrupted, tmp_path, processes, kills):
    killed = 0
    for seed in range(2):
        output = tmp_path / f"run-{seed}"
        killed += killed_at_random_moments(run_arguments, output, processes, kills // 2, seed)
        resume_to_the_end(run_arguments(output, processes=processes), output, processes)
        assert_same(output, uninterrupted(processes))
    assert killed >= kills * 3 // 4


def test_two_processes_killed_interrupted_and_terminated(run_arguments, uninterrupted, tmp_path):
    """One run: a process killed while it writes its share, Ctrl-C in the terminal, `kill` of the deepspeed command."""
    output, arguments = tmp_path / "run", run_arguments(tmp_path / "run", processes=2)
    run = start(arguments, 2, killer=(1, 2, output / "state/.epoch"))
    printed = finish(run)
    assert run.returncode != 0 and "Traceback" not in printed, printed
    assert printed.count("error: the connection to another process failed or broke off") == 1
    assert [path.name for _, path in checkpoints(output / "state")] == ["epoch-1-step-4"]

    run = start([*arguments, "--resume"], 2)
    read_until(run, "perplexity")
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does, to the launchers and everything they started
    printed = finish(run)
    assert "the same command with --resume goes on" in printed
    (step, _), *_ = checkpoints(output / "state")
    assert f"stopped after step {step} of {STEPS}" in printed

    run = start([*arguments, "--resume"], 2)
    assert "going on from" in read_until(run, "perplexity")
    run.terminate()  # the command alone; DeepSpeed would leave its children running
    assert f"of {STEPS}; the same command with --resume goes on" in finish(run)
    resume_to_the_end(arguments, output, 2)
    assert_same(output, uninterrupted(2))


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_first(run_arguments, uninterrupted, tmp_path, number, status):
    output = tmp_path / "run"
    run = start(run_arguments(output))
    read_until(run, "epoch-1-step-4: perplexity")
    os.killpg(run.pid, number)  # the data loader's worker gets it, too
    printed = finish(run)
    assert run.returncode == status, printed
    assert "Traceback" not in printed
    ((step, state),) = checkpoints(output / "state")
    assert f"stopped after step {step} of {STEPS}; the same command with --resume goes on there" in printed
    assert f"going on from {state}" in resume_to_the_end(run_arguments(output), output)
    assert_same(output, uninterrupted(1))


# ---------------------------------------------------------------- what --resume says


@pytest.fixture(scope="module")
def finished(run_arguments, tmp_path_factory):
    """A short run in this process: one epoch, one state."""
    output = tmp_path_factory.mktemp("finished") / "run"
    train.main(run_arguments(output, "--num_train_epochs", 1, "--save_model_step", 0))
    return output


def short(run_arguments, output, *more):
    return run_arguments(output, "--num_train_epochs", 1, "--save_model_step", 0, "--resume", *more)


def test_resume_without_a_state_starts_anew_and_says_so(run_arguments, finished, tmp_path, capsys):
    train.main(short(run_arguments, tmp_path / "run"))
    assert "no state is saved there yet; starting anew" in capsys.readouterr().out
    ours, theirs = (adapter_weights(output / "epoch-1-step-10") for output in (tmp_path / "run", finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_run_is_complete(run_arguments, finished, capsys):
    before = (finished / "epoch-1-step-10/adapter_model.safetensors").stat()
    train.main(short(run_arguments, finished))
    assert "is complete, nothing is left to do" in capsys.readouterr().out
    assert (finished / "epoch-1-step-10/adapter_model.safetensors").stat() == before


def test_a_run_is_not_begun_over_another(run_arguments, finished, capsys):
    assert "--resume goes on with it" in error_of(run_arguments(finished), capsys)


CLAIM = """
import pathlib, sys
from support.processes import join_processes
from support.resume import claim
join_processes()
claim(pathlib.Path(sys.argv[1]))
print("claimed", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_write_to_one_directory(run_arguments, finished, tmp_path, capsys):
    output = shutil.copytree(finished, tmp_path / "run")  # which this process has not claimed
    with subprocess.Popen(
        [sys.executable, "-c", CLAIM, output], cwd=ROOT, env=alone(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert any(b"claimed" in line for line in other.stdout)
        assert "another run is writing there" in error_of(short(run_arguments, output), capsys)
        other.kill()  # which leaves the directory to the next run
    train.main(short(run_arguments, output))


def error_of(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as error:
        train.main(arguments)
    assert error.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line


def test_another_run_is_refused(run_arguments, finished, samples, checkpoint, tmp_path, capsys, monkeypatch):
    data = tmp_path / "train.json"
    data.write_text("".join(Path(samples[0]).read_text().splitlines(keepends=True)[1:]))
    assert "with training data" in error_of(short(run_arguments, finished, "--train_path", data), capsys)
    other = shutil.copytree(checkpoint, tmp_path / "model")
    model = BaichuanForCausalLM.from_pretrained(other)
    model.model.norm.weight.data += 1
    model.save_pretrained(other)
    assert "with base model" in error_of(short(run_arguments, finished, "--model_name_or_path", other), capsys)
    assert "with --learning_rate 0.001, not 0.1" in error_of(
        short(run_arguments, finished, "--learning_rate", 0.1), capsys
    )
    with monkeypatch.context() as elsewhere:  # on a machine that computes in another precision
        elsewhere.setattr(train.processes, "precision", lambda *_: torch.bfloat16)
        other_machine = error_of(short(run_arguments, finished), capsys)
    assert "with precision torch.float32, not torch.bfloat16" in other_machine
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "with processes 1, not 2" in error_of(short(run_arguments, finished), capsys)


def test_a_state_holds_no_frozen_weights(finished):
    """Adapters, their float32 copy and two moments of Adam are four times the adapters; the base would be far more."""
    state = finished / "state/epoch-1-step-10"
    size = sum(path.stat().st_size for path in state.iterdir())
    adapters = sum(tensor.nbytes for tensor in adapter_weights(finished / "epoch-1-step-10").values())
    assert size < 4 * adapters + 20_000
    assert sorted(path.name for path in state.iterdir()) == ["process-0.pt", "run.json"]


class Code:
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("damage", ["code", "cut", "empty", "other", "gone", "run.json", "run.json []"])
def test_a_damaged_state_is_one_line(run_arguments, finished, tmp_path, capsys, damage):
    output = shutil.copytree(finished, tmp_path / "run")
    state = output / "state/epoch-1-step-10"
    moved = state.rename(state.with_name("epoch-1-step-9"))  # a step is left, so that it is loaded
    file = moved / "process-0.pt"
    if damage == "code":
        code = Code()
        code.path = tmp_path / "ran"
        torch.save({"adapters": code}, file)
    elif damage == "gone":
        file.unlink()
    elif damage.startswith("run.json"):
        (moved / "run.json").write_text(damage[9:])
    else:
        file.write_bytes({"cut": file.read_bytes()[:1000], "empty": b"", "other": b"PK\x03\x04 no state"}[damage])
    assert str(moved) in error_of(short(run_arguments, output), capsys)
    assert not (tmp_path / "ran").exists()
    assert (output / "epoch-1-step-10/adapter_model.safetensors").exists()


# ---------------------------------------------------------------- disks


if ROOT_USER:

    @pytest.mark.parametrize("kilobytes", [150, 600, 1400])
    def test_a_full_disk_is_one_line_and_older_checkpoints_stay(run_arguments, uninterrupted, mount, kilobytes):
        """The disk fills up in the first adapter, the first state, and later ones; with room it is resumed."""
        disk = mount(kilobytes * 1024)
        run = start(run_arguments(disk / "run"))
        printed = finish(run)
        assert run.returncode == 2 and "Traceback" not in printed, printed
        (line,) = [line for line in printed.splitlines() if "error:" in line]
        assert "No space left on device" in line or "cannot be written" in line
        assert_none_is_partial(disk / "run")
        for _, adapter in checkpoints(disk / "run"):
            expected = uninterrupted(1) / adapter.name
            if expected.exists():
                ours, theirs = adapter_weights(adapter), adapter_weights(expected)
                assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        resume_to_the_end(run_arguments(disk / "run"), disk / "run")
        assert_same(disk / "run", uninterrupted(1))

    def test_a_full_disk_under_the_launcher(run_arguments, mount):
        disk = mount(1100 * 1024)
        run = start(run_arguments(disk / "run", processes=2), 2)
        printed = finish(run)
        assert run.returncode == 2 and "Traceback" not in printed, printed
        assert "cannot be written" in printed

    def test_a_read_only_directory_is_one_line(run_arguments, finished, mount, capsys):
        disk = mount(20 << 20)
        shutil.copytree(finished, disk / "run")
        before = {path: path.stat().st_mtime_ns for path in disk.rglob("*")}
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert "read-only" in error_of(short(run_arguments, disk / "run"), capsys)
        assert "read-only" in error_of(short(run_arguments, disk / "new/run"), capsys)
        assert before == {path: path.stat().st_mtime_ns for path in disk.rglob("*")}


def test_an_output_directory_that_is_a_file_is_one_line(run_arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "is no directory" in error_of(run_arguments(tmp_path / "file/run"), capsys)


def test_save_total_limit_keeps_the_newest(run_arguments, tmp_path):
    arguments = run_arguments(tmp_path, "--num_train_epochs", 1, "--save_model_step", 3, "--save_total_limit", 1)
    train.main(arguments)
    assert [path.name for _, path in checkpoints(tmp_path)] == ["epoch-1-step-10"]
    assert json.loads((tmp_path / "state/epoch-1-step-10/run.json").read_text())["identity"]["processes"] == 1
