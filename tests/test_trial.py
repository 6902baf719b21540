"""What is said before the first step: memory, time and disk; and that saying it changes nothing."""

import re
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import adapter_weights
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
import utils
from baichuan import BaichuanConfig, BaichuanForCausalLM, modeling_baichuan
from support.dialogues.samples import read_samples
from support.model.directory import ModelDirectory
from support.training import memory, processes, trial

SEVEN_B = BaichuanConfig()
BOOK = memory.Way(itemsize=2, rank=16, dropout=True, checkpointing=True, four_bit=False)
GIB = 1 << 30


# ---------------------------------------------------------------- the arithmetic


def small_model(dtype: torch.dtype, checkpointing: bool, dropout: float, vocab_size: int):
    config = BaichuanConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        attn_implementation="sdpa",
    )
    model = BaichuanForCausalLM(config).to(dtype)
    lora = LoraConfig(r=16, lora_dropout=dropout, target_modules=utils.find_all_linear_names(model))
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


class Peak(TorchDispatchMode):
    """Bytes of the storages that are alive at once, at most, beyond those of a model."""

    def __init__(self, model):
        self.known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return output

    def gone(self, address, size):
        self.known.discard(address)
        self.now -= size


@pytest.mark.parametrize("vocab_size, supervised", [(2000, 32), (20_000, 200)], ids=["layers", "head"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_a_row(checkpointing, dropout, vocab_size, supervised):
    """Against the storages that are alive while the row passes. The CPU's masks of dropout are as wide as the numbers."""
    model, tokens = small_model(torch.float32, checkpointing, dropout, vocab_size), 512
    columns = torch.stack((torch.arange(tokens - supervised, tokens), torch.zeros(supervised, dtype=torch.long)), -1)
    mask = torch.ones((1, 1, tokens, tokens), dtype=torch.bool)
    with Peak(model) as storages:
        model(
            input_ids=torch.zeros((1, tokens), dtype=torch.long),
            attention_mask=mask,
            loss_positions=columns,
            use_cache=False,
        ).loss.backward()
    config, way = model.config, memory.Way(4, 16, dropout > 0, checkpointing, False)
    computed = memory.row_bytes(config, way, memory.RowSize(tokens, supervised, tokens))
    if dropout:
        masks = 3 * (4 * config.hidden_size + config.intermediate_size) * tokens
        computed += masks * (1 if checkpointing else config.num_hidden_layers)
    assert computed == pytest.approx(storages.peak, rel=0.15)


def test_weights_and_adapters_are_those_of_the_model():
    model = small_model(torch.bfloat16, False, 0.1, 2000)
    adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert memory.adapter_parameters(model.config, 16) == adapters
    assert memory.adapter_parameters(SEVEN_B, 16) == 35_782_656
    of_all = sum(parameter.nbytes for parameter in model.parameters())
    assert memory.weight_bytes(model.config, BOOK) == of_all - 2 * adapters
    assert memory.trained_bytes(SEVEN_B, BOOK) == 16 * 35_782_656
    assert memory.trained_bytes(SEVEN_B, BOOK._replace(processes=4)) == (4 + 3) * 35_782_656


@pytest.mark.parametrize(
    "gib, checkpointing, tokens, shortest, told",
    [
        (24, False, 1024, 512, "add --gradient_checkpointing"),
        (24, True, 1024, 512, "add --max_pack_len 512"),  # it fits: another program has the memory
        (12, True, 1024, 512, "add --load_in_4bit"),
        (12, False, 1024, None, "add --load_in_4bit --gradient_checkpointing"),
        (40, False, 8192, 512, "add --gradient_checkpointing"),
        (17, True, 8192, 512, "add --max_pack_len 2048"),
        (4, False, 1024, 512, "even with --load_in_4bit --gradient_checkpointing --max_pack_len 512 it needs 6.68 GB"),
    ],
)
def test_the_flag_that_makes_it_fit(gib, checkpointing, tokens, shortest, told):
    row = memory.RowSize(tokens, tokens // 3, tokens)
    way = BOOK._replace(checkpointing=checkpointing)
    assert told in memory.remedy(SEVEN_B, way, row, gib * GIB, shortest)


@pytest.mark.parametrize("flags", [[], ["--packing", "none"], ["--max_pack_len", "256"]], ids=" ".join)
def test_the_largest_row_is_found(train_arguments, checkpoint, samples, flags):
    """That of all steps, laid out one by one; from the middle of an epoch on, too."""
    args = train.parse_args([*train_arguments("out", *flags), "--num_train_epochs", "2"])
    data = utils.RoleDataset(read_samples(samples[0]), ModelDirectory(checkpoint).tokenizer, 256, 128)
    config = ModelDirectory(checkpoint).config
    steps, _ = train.lay_out(args, config, torch.device("cpu"), data, data)

    def size(row):
        return memory.row_bytes(config, BOOK, row)

    for done in (0, len(steps) - 8):
        found = trial.row_of(trial.largest_batch(steps, done, size))
        assert size(found) == max(size(trial.row_of(batch)) for k in range(done, len(steps)) for batch in steps[k][0])


# ---------------------------------------------------------------- the trial of a run

FORECAST = r"peak ([\d.]+) of ([\d.,]+) GB; 5 steps, about \d+ s; saves ([\d.]+) MB each, ([\d.]+) MB in all on a disk"


def test_a_trial_changes_nothing(train_arguments, tmp_path, monkeypatch, capsys):
    """The same adapters and states, bit for bit, as without it, in spite of dropout; and the disk takes what was said."""
    flags = ["--lora_dropout", 0.3, "--save_model_step", 2, "--sample_answers", 0]
    train.main(train_arguments(tmp_path / "with", *flags))
    numbers = re.search(FORECAST, capsys.readouterr().out).groups()
    peak, total, each, in_all = (float(number.replace(",", "")) for number in numbers)
    assert 0.05 < peak < total
    monkeypatch.setattr(train.Trial, "run", lambda *_: None)
    train.main(train_arguments(tmp_path / "without", *flags))
    for step in (2, 4, 5):
        ours, theirs = (adapter_weights(tmp_path / name / f"epoch-1-step-{step}") for name in ("with", "without"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    files = (tmp_path / "with").rglob("*.safetensors")
    adapters = [path.stat().st_size / 1e6 for path in files if not path.parent.is_symlink()]
    states = [path.stat().st_size / 1e6 for path in (tmp_path / "with").rglob("*.pt")]
    assert [pytest.approx(each, rel=0.15)] * 3 == adapters
    assert in_all == pytest.approx(sum(adapters) + 2 * sum(states), rel=0.1)  # two at a time


def test_bytes_are_told_without_exponents():
    sizes = (72e6, 300e6, 19.33e9, 999.4e9, 2.1e12)
    assert [trial.in_bytes(size) for size in sizes] == ["72 MB", "0.3 GB", "19.3 GB", "999 GB", "2,100 GB"]


def test_a_dry_run_writes_nothing(train_arguments, tmp_path, capsys):
    train.main(train_arguments(tmp_path / "run", "--dry_run"))
    assert re.search(FORECAST, capsys.readouterr().out) and not (tmp_path / "run").exists()


def error_of(capsys, arguments) -> str:
    with pytest.raises(SystemExit) as end:
        train.main(arguments)
    assert end.value.code == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")][-1]


def test_what_another_process_lacks_is_told_by_all(monkeypatch):
    def gather(found, problem):
        found[:] = [problem, "the second one's GPU is full"]

    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "all_gather_object", gather)
    assert processes.first_problem(None) == "the second one's GPU is full"


def test_too_little_memory_is_told_before_the_weights_are_loaded(train_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trial, "device_memory", lambda device: (300_000, 300_000))
    monkeypatch.setattr(train, "model_with_adapters", None)
    line = error_of(capsys, train_arguments(tmp_path / "run"))
    assert "does not fit into the 0.0003 GB of cpu memory" in line and "or take a device with more memory" in line
    assert not (tmp_path / "run").exists()


def test_a_row_that_does_not_fit_is_told_before_the_first_step(train_arguments, tmp_path, monkeypatch, capsys):
    """Out of memory in the trial, on a device that holds the weights and, with the flag that is named, the rows as well."""
    forward = modeling_baichuan.MLP.forward

    def fails(self, x):
        if x.shape[1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x)

    monkeypatch.setattr(modeling_baichuan.MLP, "forward", fails)
    monkeypatch.setattr(trial, "device_memory", lambda device: (18_000_000,) * 2)
    line = error_of(capsys, train_arguments(tmp_path / "run", "--sample_answers", 0, "--dry_run"))
    assert re.search(r"does not fit .* row of \d+ tokens: add --", line)
    assert not (tmp_path / "run").exists()


def test_the_limit_of_a_container_counts(monkeypatch):
    class Limit:
        text = "max\n"

        def __init__(self, path):
            assert path == "/sys/fs/cgroup/memory.max"

        def exists(self):
            return True

        def read_text(self):
            return self.text

    monkeypatch.setattr(trial, "Path", Limit)
    monkeypatch.setattr(trial.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB))
    assert trial.device_memory(torch.device("cpu"))[0] == 64 * GIB
    Limit.text = f"{8 * GIB}\n"
    assert trial.device_memory(torch.device("cpu"))[0] == 8 * GIB


def test_times_and_sizes_are_told_in_the_unit_that_fits():
    assert [trial.in_time(seconds) for seconds in (41, 2460, 9000)] == ["41 s", "41 min", "2.5 h"]
    assert [trial.in_bytes(np.float64(size)) for size in (71.6e6, 0.3e9, 210e9)] == ["72 MB", "0.3 GB", "210 GB"]
