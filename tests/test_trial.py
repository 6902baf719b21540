"""What is said before the first step: memory, time and disk; and that saying it changes nothing."""

import re
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from conftest import ImpatientTimer, adapter_weights

import train
import utils
from baichuan import modeling_baichuan
from support.dialogues.samples import read_samples
from support.errors import UserError
from support.model.directory import ModelDirectory
from support.training import processes, trial

FORECAST = r"peak ([\d.]+ [GM]B) of ([\d.,]+) GB; 5 steps, about 0:00:\d\d; saves ([\d.]+) MB each, ([\d.]+) MB in all on a disk"


@pytest.mark.parametrize("flags", [[], ["--packing", "none"], ["--max_pack_len", "256"]], ids=" ".join)
def test_the_largest_rows_are_found(train_arguments, checkpoint, samples, flags, monkeypatch):
    """That of all steps, laid out one by one; from the middle of an epoch on, too. Of split steps, nearly that."""
    monkeypatch.setattr(trial, "LOOKED_AT", 8)  # of 50 steps
    monkeypatch.setattr(train, "row_cost", lambda config, device: lambda length: 1000 + length)  # as few as possible
    args = train.parse_args([*train_arguments("out", *flags), "--num_train_epochs", "2"])
    directory = ModelDirectory(checkpoint)
    data = utils.RoleDataset(read_samples(samples[0]), directory.tokenizer, 256, 128)
    steps, _ = train.lay_out(args, directory.config, torch.device("cpu"), data, data)
    for done in (0, len(steps) - 12):
        largest, passes = trial.largest_rows(steps, done)
        most_supervised, row = largest[0], largest[-1]
        batches = [batch for step in range(done, len(steps)) for batch in steps[step][0]]
        for found, size in ((row, trial.tokens), (most_supervised, lambda row: len(row["loss_positions"]))):
            most = max(map(size, batches))
            assert (0.9 if "--max_pack_len" in flags else 1) * most <= size(found) <= most
        costs = [len(batch["input_ids"]) * (1000 + batch["input_ids"].shape[1]) for batch in [row, *batches]]
        assert passes == pytest.approx(sum(costs[1:]) / costs[0], rel=0.2)


@pytest.fixture
def begun(train_arguments, checkpoint, few_samples):
    """What train.py has when the trial begins, with dropout: what it gives to `try_largest_rows`."""
    args = train.parse_args(train_arguments("out", "--lora_dropout", 0.3, "--max_pack_len", 256))
    directory, config = ModelDirectory(checkpoint), train.read_deepspeed_config(args.ds_file)
    device = processes.join_processes()
    data = [utils.RoleDataset(read_samples(path), directory.tokenizer, 256, 128) for path in few_samples]
    steps, test_rows = train.lay_out(args, directory.config, device, *data)
    model = train.model_with_adapters(args, directory, torch.float32, torch.device("cpu"))
    engine = train.start_engine(model, config, args, len(steps))
    engine.train()
    return args, engine, steps, test_rows, 0, torch.float32


def test_a_trial_changes_nothing(begun, monkeypatch, capsys):
    """Neither weights nor gradients nor the mode, nor the random numbers, though dropout draws some."""
    _, engine, steps, test_rows, _, _ = begun
    test_rows[0]["loss_positions"] = test_rows[0]["loss_positions"].repeat(20, 1)  # the most of all, on few tokens
    seen, forward = [], modeling_baichuan.MLP.forward

    def watched(mlp, x):
        seen.append((mlp.training, torch.is_grad_enabled(), x.shape[0] * x.shape[1]))
        return forward(mlp, x)

    monkeypatch.setattr(modeling_baichuan.MLP, "forward", watched)
    before = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    random = torch.get_rng_state()
    trial.try_largest_rows(*begun)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.module.state_dict().items())
    assert all(parameter.grad is None for parameter in engine.module.parameters())
    assert all(module.training for module in engine.module.modules())
    rows = [batch for step in range(len(steps)) for batch in steps[step][0]]
    passed = [(True, True, row) for row in largest_by_hand(rows)]
    passed += [(False, False, row) for row in largest_by_hand(test_rows)]
    assert list(dict.fromkeys(seen)) == list(dict.fromkeys(passed))  # it was not for want of a row, nor of dropout
    assert len({row for _, _, row in passed[-2:]}) == 2
    told = capsys.readouterr()
    form = r"peak ([\d.]+) ([MG]B) of ([\d.]+) GB; 5 steps, about 0:00:\d\d; saves "
    peak, unit, total = re.match(form, told.out).groups()
    assert 50 < float(peak) * {"MB": 1, "GB": 1000}[unit] < 1000 * float(total) and told.err == ""


def largest_by_hand(rows) -> list[int]:
    """Tokens of the row with the most supervised ones, and of the longest row."""
    sizes = [(len(row["loss_positions"]), row["input_ids"].shape[1]) for row in rows]
    return [max(sizes)[1], max(size for _, size in sizes)]


def test_a_trial_that_takes_long_says_what_it_does(begun, monkeypatch, capsys):
    monkeypatch.setattr("support.command_line.Timer", ImpatientTimer)
    trial.try_largest_rows(*begun)
    assert capsys.readouterr().err == "trying the largest rows, for the memory and time of the run …\n"


def test_too_little_memory_is_told_with_the_flags_that_help(begun, monkeypatch):
    monkeypatch.setattr(trial, "free_memory", lambda device: -(10**12))  # in a container, say
    with pytest.raises(UserError, match="--gradient_checkpointing or --load_in_4bit, or lower --max_len and --max_p"):
        trial.try_largest_rows(*begun)


def test_what_is_told_of_memory_and_time(begun, monkeypatch, capsys):
    """Adam's moments come with the first step; the second pass is the one that is measured; the fullest device is told of."""
    args, engine, steps, test_rows, _, dtype = begun
    clock, rows = cycle([0, 100, 100, 107]), trial.largest_rows(steps, 0)[0]
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(trial, "largest_rows", lambda steps, done: (rows, 4000))
    monkeypatch.setattr(trial, "peak_memory_gb", lambda: 0.1)
    monkeypatch.setattr(trial, "free_memory", lambda device: 10**7)  # beside what is held already

    def told(done: int, other=None) -> str:
        def gather(found, ours):
            found[:] = [ours, other][: steps.world]

        steps.world = 2 if other else 1
        monkeypatch.setattr(trial.dist, "all_gather_object", gather)
        trial.try_largest_rows(args, engine, steps, test_rows, done, dtype)
        return capsys.readouterr().out

    moments = 8 * sum(parameter.numel() for parameter in engine.module.parameters() if parameter.requires_grad)
    assert told(0).startswith(f"peak {(1e8 + moments) / 1e6:.2f} MB of ") and moments > 10**5
    assert "; 3 steps, about 7:46:40; saves " in told(2)
    roomy, full = (5e8, 2e9, 16e9, 1), (4e8, 16e9, 4.1e8, 3600)  # peak, total, available, seconds
    assert told(0, roomy).startswith(f"peak {(1e8 + moments / 2) / 1e6:.2f} MB of ")
    assert told(0, full).startswith("peak 400.00 MB of 16.0 GB; 5 steps, about 1:00:00; ")
    with pytest.raises(UserError, match="the run takes 400.00 MB of memory and may use 390.00 MB on this device"):
        told(0, (4e8, 16e9, 3.9e8, 1))
    engine.optimizer.optimizer.state["of a state"] = {}
    assert told(0).startswith("peak 100.00 MB of ")


def test_what_is_told_of_the_disk(monkeypatch):
    """20 steps, saved after 4, 8, 10, 12, 16 and 20: an adapter of a million numbers takes 2 MB, one of two states 14."""
    steps = utils.Steps(range(100), None, 10, 2, seed=0)
    monkeypatch.setattr(trial, "free_bytes", lambda path: 39e6)
    for done, limit, needed in ((0, None, 40), (8, None, 36), (0, 2, 34), (0, 5, 40), (0, 9, 40)):  # and the best one
        args = SimpleNamespace(output_dir="out", save_model_step=4, save_total_limit=limit)
        told = f"saves 2.00 MB each, {needed}.00 MB in all on a disk with 39.00 MB free"
        told += ": too little, lower --save_total_limit" if needed == 40 else ""
        assert trial.disk_needed(10**6, 2, steps, done, args) == told


def test_a_row_that_does_not_fit_is_told_before_the_first_step(train_arguments, tmp_path, monkeypatch, capsys):
    forward = modeling_baichuan.MLP.forward

    def fails(self, x):
        if x.shape[1] > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x)

    monkeypatch.setattr(modeling_baichuan.MLP, "forward", fails)
    monkeypatch.setattr(train, "train_step", None)
    with pytest.raises(SystemExit) as end:
        train.main(train_arguments(tmp_path / "run", "--sample_answers", 0, "--dry_run"))
    (line,) = re.findall("error: .*", capsys.readouterr().err)
    assert end.value.code == 2 and "too little memory free: add --gradient_checkpointing or --load_in_4bit" in line


def test_a_dry_run_writes_nothing_and_says_what_the_disk_will_take(train_arguments, tmp_path, capsys):
    arguments = train_arguments(tmp_path / "run", "--save_model_step", 2, "--sample_answers", 0)
    train.main([*arguments, "--dry_run"])
    said = re.search(FORECAST, capsys.readouterr().out)
    assert said and not (tmp_path / "run").exists()
    train.main(arguments)
    sizes = [
        sum(tensor.nbytes for tensor in adapter_weights(path).values()) for path in (tmp_path / "run").glob("epoch*")
    ]
    states = [path.stat().st_size for path in (tmp_path / "run").rglob("*.pt")]
    assert [pytest.approx(float(said[3]) * 1e6, rel=0.05)] * 3 == sizes
    assert float(said[4]) * 1e6 == pytest.approx(sum(sizes) + 2 * sum(states), rel=0.1)  # two at a time
    told = [trial.in_bytes(size) for size in (72e6, 143e6, 19.33e9, 2.1e12)]
    assert told == ["72.00 MB", "143.00 MB", "19.3 GB", "2,100.0 GB"]
