"""A run that is killed, stopped or out of disk loses nothing: resumed, it ends as if nothing had happened, bit for bit."""

import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import FLOAT32, ROOT, ROOT_USER, adapter_weights, conversation, scalars

import train
import utils
from baichuan import BaichuanTokenizer
from support.dialogues.samples import read_samples
from support.errors import OneProcessError, UserError
from support.model.directory import ModelDirectory
from support.training import processes, resume
from support.training.checkpoints import checkpoints
from support.training.one_parameter import trained
from tests.forked import SERVER, Fork, alone, free_port, run_to_the_end

LAUNCHER = str(Path(sys.executable).parent / "deepspeed")
STEPS = 20
# Two epochs of ten steps with dropout; saved in the middle of a mean over three steps, and at the ends of the epochs.
FLAGS = ["--per_device_train_batch_size", 2, "--num_train_epochs", 2]
FLAGS += ["--lora_dropout", 0.1, "--save_model_step", 4, "--save_total_limit", 3, "--sample_answers", 0]


def command(arguments, event: dict | None) -> list:
    """event: what happens to it, for killed_at.py."""
    return ["tests/killed_at.py", *arguments, json.dumps(event)] if event else ["train.py", *arguments]


def under_the_launcher(arguments, event: dict | None = None) -> tuple[int, str]:
    """Two processes in a group of their own: the status of the command and what is printed."""
    launcher = [LAUNCHER, "--num_gpus", "2", "--master_port", str(free_port())]
    run = subprocess.Popen(
        launcher + list(map(str, command(arguments, event))),
        cwd=ROOT,
        env=alone() | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)},
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    printed = run.communicate(timeout=300)[0]  # until the last process of the group has closed its end
    return run.returncode, printed


def in_a_terminal(*command) -> tuple[list[int], str]:
    """Start a script in a terminal of its own, as behind ssh, and close that when it waits for it."""
    master, slave = pty.openpty()
    run = Fork(*command, environment=alone(), output=os.ttyname(slave))
    printed = os.read(master, 1 << 16)
    os.close(slave)  # so that reading ends when the script does
    with suppress(OSError):
        while b"waits for its terminal to be closed" not in printed:
            printed += os.read(master, 1 << 16)
    os.close(master)
    return [run.wait()], printed.decode(errors="replace")


def before(operation: str, directory, number=signal.SIGKILL, process=0, to="process") -> dict:
    """The event that killed_at.py takes: a signal, or 0 for a full disk."""
    return {"operation": operation, "directory": str(directory), "signal": number, "process": process, "to": to}


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
    statuses, printed = run_to_the_end("train.py", *arguments, processes=processes)
    assert statuses == [0] * processes, printed
    return printed


def assert_same(output, expected):
    """Adapters to the last bit, the whole of every curve, and nothing else left behind."""
    kept = [path.name for _, path in checkpoints(expected)]
    assert kept == ["epoch-2-step-12", "epoch-2-step-16", "epoch-2-step-20"]
    assert [path.name for _, path in checkpoints(output)] == kept
    for name in kept:
        ours, theirs = adapter_weights(output / name), adapter_weights(expected / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    for name in ("train_loss", "learning_rate", "grad_norm", "ppl", "test_loss"):
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


def test_killed_and_stopped_in_the_middle_of_saves(run_arguments, uninterrupted, tmp_path):
    """One run: killed before an adapter gets its name, in a terminal that is closed, killed between a state and the removal
    of the older one, and told to stop; each time it is resumed, and in the end it is as if nothing had happened.
    """
    output, resume = tmp_path / "run", []
    events = [
        (signal.SIGKILL, "os.rename .epoch-1-step-4.tmp", []),
        (signal.SIGHUP, "os.rename state/.epoch-1-step-4.tmp", ["epoch-1-step-5"]),
        (signal.SIGKILL, "os.rename state/epoch-1-step-8", ["epoch-1-step-8", "epoch-1-step-10"]),
        (signal.SIGINT, "os.rename state/.epoch-2-step-12.tmp", ["epoch-2-step-13"]),
    ]
    for number, operation, left in events:
        # Signals reach the whole group, and so the data loader's worker, too.
        to = "terminal" if number == signal.SIGHUP else "group"
        run = in_a_terminal if number == signal.SIGHUP else run_to_the_end
        event = before(operation, output, number, to=to)
        (status,), printed = run(*command([*run_arguments(output), *resume], event))
        assert_none_is_partial(output)
        assert [path.name for _, path in checkpoints(output / "state")] == left, printed
        if number == signal.SIGKILL:
            assert status == -number, printed
        else:
            assert status == 128 + number and "Traceback" not in printed, printed
            step = left[0].split("-")[-1]
            told = f"stopped after step {step} of {STEPS}; the same command with --resume goes on there"
            assert (told in printed) == (number != signal.SIGHUP)
        resume = ["--resume"]
    assert f"going on from {output}/state/{left[0]}" in train_to_the_end([*run_arguments(output), "--resume"])
    assert_same(output, uninterrupted(1))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_file_operation(run_arguments, uninterrupted, tmp_path, processes):
    """All processes at once, before operations of one that are spread over the whole run, so that each kind is met."""
    watched = tmp_path / "watched"
    _, printed = run_to_the_end(
        *command(run_arguments(watched, processes=processes), before("", watched)), processes=processes
    )
    draw = random.Random(processes)
    for number in range(8):
        process = number % processes
        operations = list(dict.fromkeys(re.findall(rf"^operation of {process}: (.*)$", printed, re.MULTILINE)))
        first, last = (len(operations) * n // 8 for n in (number, number + 1))
        operation = operations[draw.randrange(first, last)]
        output = tmp_path / f"run-{number}"
        arguments = run_arguments(output, processes=processes)
        event = before(operation, output, process=process, to="group")
        if processes == 2:
            status, _ = under_the_launcher(arguments, event)
        else:
            (status,), _ = run_to_the_end(*command(arguments, event))
        assert status == -signal.SIGKILL, operation
        assert_none_is_partial(output)
        train_to_the_end([*arguments, "--resume"], processes)
        assert_same(output, uninterrupted(processes))


def test_two_processes_failed_and_terminated(run_arguments, uninterrupted, tmp_path):
    """One run: the disk is full for one process's share, then the deepspeed command is told to end; it is resumed."""
    output = tmp_path / "run"
    arguments = run_arguments(output, processes=2)
    full = before("open state/.epoch-1-step-8.tmp/process-1.pt", output, 0, process=1)
    statuses, printed = run_to_the_end(*command(arguments, full), processes=2)
    assert statuses == [2, 2] and "Traceback" not in printed, printed
    assert printed.count(f"error: {output}/state/epoch-1-step-8: cannot be written: the disk is full") == 1, printed
    assert printed.count("error: the connection to another process failed or broke off") <= 1
    assert [path.name for _, path in checkpoints(output / "state")] == ["epoch-1-step-4"]

    # The command alone; DeepSpeed would leave its children running.
    saved = "os.rename state/.epoch-2-step-12.tmp"
    _, printed = under_the_launcher([*arguments, "--resume"], before(saved, output, signal.SIGTERM, to="command"))
    assert "going on from" in printed
    assert f"stopped after step 13 of {STEPS}; the same command with --resume goes on" in printed
    train_to_the_end([*arguments, "--resume"], 2)
    assert_same(output, uninterrupted(2))


# ---------------------------------------------------------------- what --resume says


@pytest.fixture(scope="module")
def finished(run_arguments, tmp_path_factory):
    """A short run in this process: one epoch, one state. With --resume, which starts anew where there is none."""
    output = tmp_path_factory.mktemp("finished") / "run"
    train.main(short(run_arguments, output))
    return output


def short(run_arguments, output, *more):
    return run_arguments(output, "--num_train_epochs", 1, "--save_model_step", 0, "--resume", *more)


def error_of(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as error:
        train.main(arguments)
    assert error.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line


def test_a_finished_run_is_complete_also_beside_a_base_that_was_moved(
    run_arguments, finished, checkpoint, tmp_path, capsys
):
    before = (finished / "epoch-1-step-10/adapter_model.safetensors").stat()
    base = shutil.copytree(checkpoint, tmp_path / "moved")
    train.main(short(run_arguments, finished, "--model_name_or_path", base))
    assert "is complete, nothing is left to do" in capsys.readouterr().out
    assert (finished / "epoch-1-step-10/adapter_model.safetensors").stat() == before


def test_a_run_is_not_begun_over_another(run_arguments, finished, capsys):
    assert "--resume goes on with it" in error_of(run_arguments(finished), capsys)


def claim_and_wait(directory: Path, told):
    processes.join_processes()
    resume.claim(directory, dry_run=False)
    told.send("claimed")
    signal.pause()


def test_two_runs_do_not_write_to_one_directory(run_arguments, finished, tmp_path, capsys):
    """And the second one does not call damaged what the first one is about to replace."""
    output = shutil.copytree(finished, tmp_path / "run")  # which this process has not claimed
    (output / "state/.epoch-1-step-10.tmp").mkdir()  # left by a run that was killed
    heard, told = SERVER.Pipe(duplex=False)
    other = SERVER.Process(target=claim_and_wait, args=(output, told))
    other.start()
    told.close()
    assert heard.recv() == "claimed"
    assert not (output / "state/.epoch-1-step-10.tmp").exists()
    (output / "state/epoch-1-step-10/run.json").unlink()
    for more in ([], ["--dry_run"]):
        assert "another run is writing there" in error_of(short(run_arguments, output, *more), capsys)
    other.kill()  # which leaves the directory to the next run
    other.join()
    resume.claim(output, dry_run=True)
    resume.claim(output, dry_run=False)


def test_hosts_without_a_common_output_directory_are_refused(tmp_path, monkeypatch):
    processes.join_processes()
    monkeypatch.setattr(resume.dist, "get_rank", lambda: 1)
    with pytest.raises(OneProcessError, match="is not what the first host writes to"):
        resume.claim(tmp_path / "run", dry_run=False)


# Flags that say where things are, what is shown and kept, how fast it goes; and those that are seen in the data.
NO_MATTER = {"train_path", "test_path", "model_name_or_path", "ds_file", "output_dir", "resume", "local_rank"}
NO_MATTER |= {"show_loss_step", "save_model_step", "save_total_limit", "sample_answers"}
NO_MATTER |= {"eval_steps", "patience", "dry_run", "config"}
NO_MATTER |= {"attn_implementation", "gradient_checkpointing", "compile", "packing", "max_pack_len"}
NO_MATTER |= {"max_len", "max_src_len", "is_skip"}


def test_another_run_is_refused(run_arguments, finished, few_samples, checkpoint, tmp_path, monkeypatch):
    """Each thing that makes a run the same run is changed by itself, and named."""
    ds_file, state = tmp_path / "ds.json", finished / "state/epoch-1-step-10"
    ds_file.write_text(json.dumps(FLOAT32 | {"gradient_clipping": 0.5}))
    directory = ModelDirectory(checkpoint)
    data, test_data = (utils.RoleDataset(read_samples(path), directory.tokenizer, 256, 128) for path in few_samples)
    changes = {
        "DeepSpeed configuration": ["--ds_file", ds_file],
        **{f"--{name}": [f"--{name}", 2] for name in ("num_train_epochs", "weight_decay", "seed", "lora_dim")},
        **{f"--{name}": [f"--{name}", 0.5] for name in ("learning_rate", "warmup_ratio", "lora_alpha", "lora_dropout")},
        **{f"--{name}": [f"--{name}", 3] for name in ("gradient_accumulation_steps", "per_device_train_batch_size")},
        "--load_in_4bit": ["--load_in_4bit"],
        **dict.fromkeys(("training data", "test data", "base weights", "processes", "precision"), []),
    }
    saved = json.loads((state / "run.json").read_text())["identity"]
    assert changes.keys() == saved.keys()
    assert vars(train.parse_args([])).keys() - NO_MATTER == {name[2:] for name in saved if name.startswith("--")}
    for name, change in changes.items():
        args, base, dtype = (
            train.parse_args(short(run_arguments, finished, *change)),
            directory.fingerprint,
            torch.float32,
        )
        with monkeypatch.context() as elsewhere:
            if name == "processes":
                elsewhere.setenv("WORLD_SIZE", "2")
            elif name == "base weights":
                base = "0" * 16
            elif name == "precision":
                dtype = torch.bfloat16
            elif name in ("training data", "test data"):
                other = data if name == "training data" else test_data
                elsewhere.setattr(other, "ids", other.ids[:-1])
            identity = resume.run_identity(args, base, data, test_data, dtype)
        with pytest.raises(UserError) as refused:
            resume.find_state(finished, identity)
        told = f"{state}: was saved with {name} {saved[name]}, not {identity[name]}: change that back"
        assert len(refused.value.problems) == 1 and refused.value.problems[0].startswith(told)


def test_data_are_others_that_differ_in_what_is_trained_alone(checkpoint, monkeypatch):
    identity = resume.data_fingerprint
    tokenizer, spoken = (
        ModelDirectory(checkpoint).tokenizer,
        conversation("你是李白。", "你是谁？", "李白。", "酒？", "来！"),
    )
    silent = conversation("你是李白。", "你是谁？", "李白。", "酒？", "来！", silent=[1])
    all_data = [utils.RoleDataset([sample, spoken], tokenizer, 256, 128) for sample in (spoken, silent)]
    assert all_data[0].ids.tolist() == all_data[1].ids.tolist() and identity(all_data[0]) != identity(all_data[1])
    for name in ("ids", "starts", "loss_positions", "loss_starts", "persona", "personas"):
        with monkeypatch.context() as changed:
            before = identity(all_data[0])
            changed.setattr(all_data[0], name, getattr(all_data[1], name)[:-1])
            assert identity(all_data[0]) != before, name


def test_processes_that_differ_are_refused(monkeypatch):
    def gather(found, own):
        found[:] = [own, own | {"training data": "another host's"}]

    monkeypatch.setattr(processes.dist, "all_gather_object", gather)
    with pytest.raises(UserError, match="the processes differ in training data: give all hosts the same"):
        resume.find_state("nowhere", {"training data": "0", "--seed": 1})


def test_overflow_in_float16_is_neither_nan_nor_a_step_and_the_loss_scale_is_resumed(
    run_arguments, tmp_path, monkeypatch
):
    """The scale is too high at first: DeepSpeed leaves steps out. Resumed, the run goes on with the scale it had."""
    processes.join_processes()
    from deepspeed import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    ds_file, whole, copy = tmp_path / "float16.json", tmp_path / "run", tmp_path / "at step 2"
    # It doubles after every third step without an overflow, so that the count of those steps matters as well.
    float16 = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 3}
    ds_file.write_text(json.dumps(FLOAT32 | {"fp16": float16}))
    flags = ["--ds_file", ds_file, "--num_train_epochs", 1, "--save_model_step", 2]
    scales, update, save_state = [], train.update, train.save_state

    def watched(engine, dtype, numbers):
        before = [parameter.detach().clone() for parameter in trained(engine.module)]
        found = update(engine, dtype, numbers)
        scales.append((engine.optimizer.overflow, engine.optimizer.loss_scale))
        assert all(map(torch.equal, before, trained(engine.module))) == engine.optimizer.overflow
        return found

    def saved(engine, directory, run):
        save_state(engine, directory, run)
        if directory.name == "epoch-1-step-2":
            shutil.copytree(whole, copy, dirs_exist_ok=True)

    monkeypatch.setattr(train, "update", watched)
    monkeypatch.setattr(train, "save_state", saved)
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
    assert 4 * adapters < size < 4 * adapters + 20_000  # 16 bytes a weight, as docs/resuming.md says
    assert sorted(path.name for path in state.iterdir()) == ["process-0.pt", "run.json"]


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_damaged_state_is_one_line_and_its_code_is_not_run(run_arguments, finished, tmp_path, capsys):
    output = shutil.copytree(finished, tmp_path / "run")
    state = output / "state/epoch-1-step-10"
    state = state.rename(state.with_name("epoch-1-step-9"))  # a step is left, so that it is loaded
    torch.save({"adapters": Code(tmp_path / "ran")}, state / "process-0.pt")
    assert f"{state}/process-0.pt: is damaged" in error_of(short(run_arguments, output), capsys)
    assert not (tmp_path / "ran").exists()
    (state / "run.json").write_text("{}")
    assert f"{state}: is damaged" in error_of(short(run_arguments, output), capsys)


def test_a_state_that_another_process_cannot_read_is_told(tmp_path, monkeypatch):
    """The first process, which tells what all have, would say nothing of it. And want of memory is no damage."""
    monkeypatch.setattr(resume.dist, "get_rank", lambda: 1)
    with pytest.raises(OneProcessError, match="process-1.pt: is damaged"):
        resume.load_state(None, tmp_path)
    monkeypatch.setattr(resume, "out_of_memory", lambda error: True)
    pytest.raises(FileNotFoundError, resume.load_state, None, tmp_path)


if ROOT_USER:

    def test_a_full_disk_is_one_line_and_older_checkpoints_stay(run_arguments, uninterrupted, mount, capsys):
        """The disk fills up in a later state; with room it is resumed."""
        disk = mount(1400 * 1024)
        line = error_of(run_arguments(disk / "run"), capsys)
        assert "No space left on device" in line or "cannot be written" in line
        assert_none_is_partial(disk / "run")
        assert checkpoints(disk / "run/state")
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        train.main([*run_arguments(disk / "run"), "--resume"])  # here, since this process has claimed the directory
        assert_same(disk / "run", uninterrupted(1))
