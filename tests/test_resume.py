"""A run that is killed, stopped or out of disk loses nothing: resumed, it ends as if nothing had happened, bit for bit."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FLOAT32, ROOT, ROOT_USER, adapter_weights, alone, free_port, scalars
from safetensors.torch import load_file
from tensorboard.summary.writer import event_file_writer

import train
from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from support.errors import OneProcessError
from support.model.weights import write_weights
from support.training import resume
from support.training.resume import checkpoints

LAUNCHER = str(Path(sys.executable).parent / "deepspeed")
STEPS = 20
# Two epochs of ten steps with dropout; saved in the middle of a mean over three steps, and at the ends of the epochs.
FLAGS = ["--per_device_train_batch_size", 2, "--num_train_epochs", 2]
FLAGS += ["--lora_dropout", 0.1, "--save_model_step", 4, "--save_total_limit", 3, "--sample_answers", 0]


def start(arguments, processes: int = 1, event: dict | None = None) -> subprocess.Popen:
    """train.py in a process group of its own. event: what happens to it, for killed_at.py."""
    command = ["tests/killed_at.py", *arguments, json.dumps(event)] if event else ["train.py", *arguments]
    launcher = [LAUNCHER, "--num_gpus", processes, "--master_port", free_port()] if processes > 1 else [sys.executable]
    return subprocess.Popen(
        [str(part) for part in launcher + command],
        cwd=ROOT,
        env=alone() | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def before(operation: str, directory, number=signal.SIGKILL, process=0, to="process") -> dict:
    """The event that killed_at.py takes: a signal, or 0 for a full disk."""
    return {"operation": operation, "directory": str(directory), "signal": number, "process": process, "to": to}


def finish(run: subprocess.Popen) -> str:
    output, _ = run.communicate(timeout=300)  # until the last process of the group has closed its end
    return output


@pytest.fixture(autouse=True, scope="module")
def event_files_in_order():
    """TensorBoard reads its files in the order of their names, which begin with a second: a run in this process, which
    may begin within a second of the one before, gets a later one.
    """
    later = itertools.count(int(time.time()) + 3600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: next(later)))
        yield


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
            train_to_the_end(run_arguments(known[processes], processes=processes), processes)
        return known[processes]

    return run


def train_to_the_end(arguments, processes=1) -> str:
    """In processes of their own, as a user trains. Returns what they print."""
    run = start(arguments, processes)
    printed = finish(run)
    assert run.returncode == 0, printed
    return printed


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


def assert_none_is_partial(output):
    """What goes by the name of an adapter or a state can be used, whenever one looks."""
    for _, adapter in checkpoints(output):
        assert adapter_weights(adapter) and json.loads((adapter / "adapter_config.json").read_text()), adapter
        assert BaichuanTokenizer.from_pretrained(adapter).text_to_ids("俺老孙")
    for _, state in checkpoints(output / "state"):
        assert json.loads((state / "run.json").read_text())["identity"]
        assert torch.load(state / "process-0.pt", weights_only=True)["schedule"]


# ---------------------------------------------------------------- killed


def test_killed_in_the_middle_of_saves(run_arguments, uninterrupted, tmp_path):
    """Before an adapter gets its name, before a state gets it, and between a state and the removal of the older one."""
    output = tmp_path / "run"
    left = []
    for operation in (
        "os.rename .epoch-1-step-4.tmp",
        "os.rename state/.epoch-1-step-8.tmp",
        "os.rename state/epoch-2-step-12",
    ):
        resume = ["--resume"] if output.exists() else []
        run = start([*run_arguments(output), *resume], event=before(operation, output))
        printed = finish(run)
        assert run.returncode == -signal.SIGKILL, printed
        assert_none_is_partial(output)
        left.append([path.name for _, path in checkpoints(output / "state")])
    assert left == [[], ["epoch-1-step-4"], ["epoch-2-step-12", "epoch-2-step-16"]]
    train_to_the_end([*run_arguments(output), "--resume"])
    assert_same(output, uninterrupted(1))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_file_operation(run_arguments, uninterrupted, tmp_path, processes):
    """All processes at once, before operations of one that are spread over the whole run, so that each kind is met."""
    watched = tmp_path / "watched"
    printed = finish(start(run_arguments(watched, processes=processes), processes, event=before("", watched)))
    draw = random.Random(processes)
    for number in range(8):
        process = number % processes
        operations = list(dict.fromkeys(re.findall(rf"^operation of {process}: (.*)$", printed, re.MULTILINE)))
        first, last = (len(operations) * n // 8 for n in (number, number + 1))
        operation = operations[draw.randrange(first, last)]
        output = tmp_path / f"run-{number}"
        arguments = run_arguments(output, processes=processes)
        run = start(arguments, processes, event=before(operation, output, process=process, to="group"))
        finish(run)
        assert run.returncode == -signal.SIGKILL, operation
        assert_none_is_partial(output)
        train_to_the_end([*arguments, "--resume"], processes)
        assert_same(output, uninterrupted(processes))


def test_two_processes_failed_interrupted_and_terminated(run_arguments, uninterrupted, tmp_path):
    """One run: the disk is full for one process's share, then that process is killed, then Ctrl-C in the terminal,
    and `kill` of the deepspeed command; each time it is resumed.
    """
    output = tmp_path / "run"
    arguments = run_arguments(output, processes=2)
    share = "open state/.epoch-1-step-{}.tmp/process-1.pt"
    run = start(arguments, 2, before(share.format(4), output, 0, process=1))
    printed = finish(run)
    assert run.returncode != 0 and "Traceback" not in printed, printed
    own = f"error: {output}/state/epoch-1-step-4: cannot be written: the disk is full"
    assert printed.count(own) == 1, printed
    assert printed.count("error: the connection to another process failed or broke off") <= 1
    assert not checkpoints(output / "state")

    run = start([*arguments, "--resume"], 2, before(share.format(8), output, process=1))
    printed = finish(run)
    assert run.returncode != 0 and "Traceback" not in printed, printed
    assert printed.count("error: the connection to another process failed or broke off") == 1
    assert [path.name for _, path in checkpoints(output / "state")] == ["epoch-1-step-4"]

    saved = "os.rename state/.epoch-{}-step-{}.tmp"
    # As a terminal does, to the launchers and everything they started.
    run = start([*arguments, "--resume"], 2, before(saved.format(1, 8), output, signal.SIGINT, to="group"))
    assert f"stopped after step 9 of {STEPS}; the same command with --resume goes on" in finish(run)

    # The command alone; DeepSpeed would leave its children running.
    run = start([*arguments, "--resume"], 2, before(saved.format(2, 12), output, signal.SIGTERM, to="command"))
    printed = finish(run)
    assert "going on from" in printed
    assert f"stopped after step 13 of {STEPS}; the same command with --resume goes on" in printed
    train_to_the_end([*arguments, "--resume"], 2)
    assert_same(output, uninterrupted(2))


def test_a_signal_saves_first(run_arguments, uninterrupted, tmp_path):
    output, resume = tmp_path / "run", []
    for number, status, epoch, step in ((signal.SIGTERM, 143, 1, 4), (signal.SIGINT, 130, 2, 12)):
        saved = f"os.rename state/.epoch-{epoch}-step-{step}.tmp"
        # The data loader's worker gets it, too.
        run = start([*run_arguments(output), *resume], event=before(saved, output, number, to="group"))
        printed = finish(run)
        assert run.returncode == status, printed
        assert "Traceback" not in printed
        ((_, state),) = checkpoints(output / "state")
        assert state.name == f"epoch-{epoch}-step-{step + 1}"
        assert f"stopped after step {step + 1} of {STEPS}; the same command with --resume goes on there" in printed
        resume = ["--resume"]
    assert f"going on from {state}" in train_to_the_end([*run_arguments(output), "--resume"])
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
from support.training.processes import join_processes
from support.training.resume import claim
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


# Flags that say where things are, what is shown and kept, how fast it goes; and those that are seen in the data.
NO_MATTER = {"train_path", "test_path", "model_name_or_path", "ds_file", "output_dir", "resume", "local_rank"}
NO_MATTER |= {"show_loss_step", "save_model_step", "save_total_limit", "sample_answers"}
NO_MATTER |= {"eval_steps", "patience", "dry_run", "config"}
NO_MATTER |= {"attn_implementation", "gradient_checkpointing", "compile", "packing", "max_pack_len"}
NO_MATTER |= {"max_len", "max_src_len", "is_skip"}


def test_another_run_is_refused(
    run_arguments, finished, few_samples, checkpoint, float32_ds_file, tmp_path, capsys, monkeypatch
):
    """Each thing that makes a run the same run is changed by itself, and named."""
    data, ds_file = tmp_path / "train.json", tmp_path / "ds.json"
    data.write_text("".join(Path(few_samples[0]).read_text().splitlines(keepends=True)[1:]))
    ds_file.write_text(json.dumps(json.loads(Path(float32_ds_file).read_text()) | {"gradient_clipping": 0.5}))
    model_directory = shutil.copytree(checkpoint, tmp_path / "model")
    model = BaichuanForCausalLM.from_pretrained(model_directory)
    model.model.norm.weight.data += 1
    model.save_pretrained(model_directory)
    changes = {
        "training data": ["--train_path", data],
        "base weights": ["--model_name_or_path", model_directory],
        "DeepSpeed configuration": ["--ds_file", ds_file],
        **{f"--{name}": [f"--{name}", 2] for name in ("num_train_epochs", "weight_decay", "seed", "lora_dim")},
        **{f"--{name}": [f"--{name}", 0.5] for name in ("learning_rate", "warmup_ratio", "lora_alpha", "lora_dropout")},
        **{f"--{name}": [f"--{name}", 3] for name in ("gradient_accumulation_steps", "per_device_train_batch_size")},
        "--load_in_4bit": ["--load_in_4bit"],
        "processes": [],
        "precision": [],
    }
    identity = json.loads((finished / "state/epoch-1-step-10/run.json").read_text())["identity"]
    assert changes.keys() == identity.keys()
    flags = vars(train.parse_args([])).keys()
    assert flags - NO_MATTER == {name[2:] for name in identity if name.startswith("--")}
    for name, change in changes.items():
        with monkeypatch.context() as elsewhere:
            if name == "processes":
                elsewhere.setenv("WORLD_SIZE", "2")
            if name == "precision":  # on a machine that computes in another one
                elsewhere.setattr(train.processes, "precision", lambda *_: torch.bfloat16)
            line = error_of(short(run_arguments, finished, *change), capsys)
        assert f"was saved with {name} {identity[name]}, not " in line, line


@pytest.fixture
def copy_at_step_2(monkeypatch, tmp_path):
    """The output directory as it was when the state of step 2 had been saved."""
    save_state, copy = train.save_state, tmp_path / "at step 2"

    def saved(engine, directory, run):
        save_state(engine, directory, run)
        if directory.name == "epoch-1-step-2":
            shutil.copytree(directory.parent.parent, copy)

    monkeypatch.setattr(train, "save_state", saved)
    return copy


def test_the_loss_scale_is_resumed(run_arguments, copy_at_step_2, tmp_path, monkeypatch):
    """In float16, where it has fallen from too high a start by then; begun anew, it would cost steps again."""
    train.processes.join_processes()
    from deepspeed import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    ds_file = tmp_path / "float16.json"
    # It doubles after every third step without an overflow, so that the count of those steps matters as well.
    float16 = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 3}
    ds_file.write_text(json.dumps(FLOAT32 | {"fp16": float16}))
    flags = ["--ds_file", ds_file, "--num_train_epochs", 1, "--save_model_step", 2]
    scales, update = [], train.update

    def watched(engine, dtype):
        norm = update(engine, dtype)
        scales.append((engine.optimizer.overflow, engine.optimizer.loss_scale))
        return norm

    monkeypatch.setattr(train, "update", watched)
    whole, copy = tmp_path / "run", copy_at_step_2
    train.main(run_arguments(whole, *flags))
    expected = scales[2:]
    assert scales[0] == (True, 2.0**23) and not all(overflow for overflow, _ in expected)
    scales.clear()
    train.main(run_arguments(copy, *flags, "--resume"))
    assert scales == expected
    ours, theirs = (adapter_weights(output / "epoch-1-step-10") for output in (copy, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


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


@pytest.mark.parametrize("damage", ["code", "cut", "empty", "other", "gone", "run.json", "run.json []", "best"])
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
    elif damage == "best":
        run = json.loads((moved / "run.json").read_text())
        (moved / "run.json").write_text(json.dumps(run | {"best": run["best"] | {"saves_since": None}}))
    elif damage.startswith("run.json"):
        (moved / "run.json").write_text(damage[9:])
    else:
        file.write_bytes({"cut": file.read_bytes()[:1000], "empty": b"", "other": b"PK\x03\x04 no state"}[damage])
    assert str(moved) in error_of(short(run_arguments, output), capsys)
    assert not (tmp_path / "ran").exists()
    assert (output / "epoch-1-step-10/adapter_model.safetensors").exists()


def test_want_of_memory_is_no_damage_of_a_state(run_arguments, finished, tmp_path, capsys, monkeypatch):
    """Whoever reads that his state is damaged deletes it."""
    output = shutil.copytree(finished, tmp_path / "run")
    (output / "state/epoch-1-step-10").rename(output / "state/epoch-1-step-9")

    def full(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(resume.torch, "load", full)
    error = error_of(short(run_arguments, output), capsys)
    assert "too little memory" in error and "damaged" not in error


def test_a_base_that_was_moved_and_saved_anew_is_the_same_run(run_arguments, finished, checkpoint, tmp_path, capsys):
    base = Path(shutil.copytree(checkpoint, tmp_path / "moved"))
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    write_weights(base, tensors, shard_bytes=100_000)
    train.main(short(run_arguments, finished, "--model_name_or_path", base))
    assert "is complete, nothing is left to do" in capsys.readouterr().out


def test_a_state_from_before_the_fingerprint_is_taken(run_arguments, finished, tmp_path, capsys):
    output = shutil.copytree(finished, tmp_path / "run")
    path = output / "state/epoch-1-step-10/run.json"
    run = json.loads(path.read_text())
    run["identity"]["base model"] = run["identity"].pop("base weights")[::-1]
    path.write_text(json.dumps(run))
    train.main(short(run_arguments, output))
    assert "is complete, nothing is left to do" in capsys.readouterr().out


def test_a_state_that_another_process_cannot_read_is_told(tmp_path, monkeypatch):
    """The first process, which tells what all have, would say nothing of it."""
    monkeypatch.setattr(resume.dist, "get_rank", lambda: 1)
    with pytest.raises(OneProcessError, match="process-1.pt: is damaged"):
        resume.load_state(None, tmp_path)


# ---------------------------------------------------------------- disks


def test_on_disk_before_it_has_its_name(run_arguments, tmp_path, monkeypatch):
    """What a power cut leaves is whole: files and the names in their directory first, then the name, then older ones go."""
    on_disk, named, fsync = set(), set(), os.fsync

    def identity(path_or_file):
        found = os.stat(path_or_file)
        return found.st_ino, found.st_mtime_ns  # written to later, it is another one

    def synced(descriptor):
        fsync(descriptor)
        on_disk.add(identity(descriptor))
        assert not named or os.stat(descriptor).st_ino in named, f"other things come before the name of {done[-1]}"
        named.clear()

    def renaming(rename):
        def renamed(source, target, **directories):
            source, target = Path(source), Path(target)
            hidden = target.name.endswith(".old.tmp")
            if hidden:
                assert not named, f"{source} goes before its successor's name is on disk"
            for path in [] if hidden else [source, *source.rglob("*")]:
                assert identity(path) in on_disk, f"{path} may be empty when {target} is there"
            rename(source, target, **directories)
            done.append(target.name)
            if not hidden:
                named.add(target.parent.stat().st_ino)

        return renamed

    done = []
    output = tmp_path / "run"
    monkeypatch.setattr(os, "fsync", synced)
    for name in ("rename", "replace"):  # pathlib's call these
        monkeypatch.setattr(os, name, renaming(getattr(os, name)))
    train.main(run_arguments(output, "--num_train_epochs", 1, "--save_total_limit", 1))
    assert not named
    saved = ["epoch-1-step-4"] * 2 + ["epoch-1-step-8"] * 2 + ["epoch-1-step-10"] * 2  # each an adapter and a state
    assert [name for name in done if name.startswith("epoch")] == saved
    assert done[0] == "train_args.json" and len([name for name in done if name.endswith(".old.tmp")]) == 4


if ROOT_USER:

    @pytest.mark.parametrize("kilobytes", [150, 600, 1400])
    def test_a_full_disk_is_one_line_and_older_checkpoints_stay(run_arguments, uninterrupted, mount, kilobytes):
        """The disk fills up in the first adapter, the first state, and later ones; with room it is resumed."""
        expected = uninterrupted(1)
        disk = mount(kilobytes * 1024)
        run = start(run_arguments(disk / "run"))
        printed = finish(run)
        assert run.returncode == 2 and "Traceback" not in printed, printed
        (line,) = [line for line in printed.splitlines() if "error:" in line]
        assert "No space left on device" in line or "cannot be written" in line
        assert_none_is_partial(disk / "run")
        for _, adapter in checkpoints(disk / "run"):
            if (expected / adapter.name).exists():
                ours, theirs = adapter_weights(adapter), adapter_weights(expected / adapter.name)
                assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        train_to_the_end([*run_arguments(disk / "run"), "--resume"])
        assert_same(disk / "run", expected)

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
