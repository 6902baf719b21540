"""train.py as a user starts it: in one process, under the launcher, in two processes; and what it refuses to start."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FLOAT32, ROOT, adapter_weights, scalars
from peft import PeftModel

import train
import utils
from baichuan import BaichuanForCausalLM, processes
from baichuan.loading import load_tokenizer
from data_helper import read_samples

LAUNCHER = Path(sys.executable).parent / "deepspeed"


def launch(processes: int, arguments: list[str], **options) -> subprocess.CompletedProcess:
    port = 29_500 + os.getpid() % 1000  # apart from a launcher that may run beside the tests
    command = [LAUNCHER, "--num_gpus", processes, "--master_port", port, "train.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def trained(train_arguments, tmp_path_factory):
    """An epoch of 25 steps with prefix rows; `(output_dir, its adapter's directory)`."""
    output = tmp_path_factory.mktemp("trained")
    train.main(train_arguments(output, "--save_model_step", 10))
    return output, output / "epoch-1-step-25"


@pytest.fixture(scope="module")
def expected_losses(checkpoint, samples):
    """The loss of the first step before any update, sample by sample with transformers' own labels."""
    tokenizer, generation_config = load_tokenizer(checkpoint)
    data = utils.RoleDataset(read_samples(samples[0]), tokenizer, generation_config, 256, 128)
    model = BaichuanForCausalLM.from_pretrained(checkpoint).eval()
    total, tokens = 0.0, 0
    for index in utils.Steps(data, None, 8, 1, 1234).samples(0):
        ids, answer = data.sample(index)
        persona = torch.tensor(data.personas[data.persona[index]])
        labels = torch.cat((torch.full((len(persona) + answer,), -100), ids[answer:]))
        count = len(ids) - answer
        total += model(torch.cat((persona, ids))[None], labels=labels[None]).loss.item() * count
        tokens += count
    return total / tokens


def test_writes_adapters_curves_and_arguments(trained, checkpoint):
    output, last = trained
    names = sorted(path.name for path in output.iterdir())
    assert [name for name in names if name.startswith("epoch")] == [f"epoch-1-step-{n}" for n in (10, 20, 25)]
    assert json.loads((output / "train_args.json").read_text())["lora_dim"] == 16
    for name in ("train_loss", "learning_rate", "grad_norm", "samples_per_second", "tokens_per_second"):
        assert [step for step, _ in scalars(output, name)] == list(range(1, 26)), name
    assert [step for step, _ in scalars(output, "ppl")] == [10, 20, 25]
    files = {path.name for path in last.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.model", "tokenizer_config.json"} <= files
    weights = adapter_weights(last)
    assert len(weights) == 2 * 5 * 2  # A and B of five linear layers in each of two decoder layers
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in weights)
    config = json.loads((last / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (16, 64, checkpoint)
    assert not [path for path in output.rglob("*") if ".tmp" in path.name]


def test_the_first_loss_is_the_mean_over_supervised_tokens(trained, expected_losses):
    assert scalars(trained[0], "train_loss")[0][1] == pytest.approx(expected_losses, abs=1e-5)


def test_learning_rates_are_on_the_documented_curve(trained):
    total, rate = 25, 1e-3
    warmup = max(1, round(0.03 * total))
    expected = [
        rate * step / warmup
        if step <= warmup
        else rate * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))))
        for step in range(1, total + 1)
    ]
    assert [value for _, value in scalars(trained[0], "learning_rate")] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "step, total, ratio, factor",
    [(1, 100, 0.03, 1 / 3), (3, 100, 0.03, 1), (100, 100, 0.03, 0.1), (1, 1, 0.5, 1), (1, 5, 0, 1), (3, 5, 0, 0.55)],
)
def test_learning_rate_by_hand(step, total, ratio, factor):
    assert train.learning_rate_factor(step, total, ratio) == pytest.approx(factor)


def test_perplexity_is_that_of_the_saved_adapter(trained, checkpoint, samples):
    """Loaded by PEFT on the base, sample by sample: the value in the log is exact."""
    output, last = trained
    tokenizer, generation_config = load_tokenizer(checkpoint)
    data = utils.RoleDataset(read_samples(samples[1]), tokenizer, generation_config, 256, 128)
    model = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), last).eval()
    total, tokens = 0.0, 0
    for index in range(len(data)):
        ids, answer = data.sample(index)
        ids = torch.cat((torch.tensor(data.personas[data.persona[index]]), ids))
        logits = model(ids[None]).logits[0].log_softmax(-1)
        places = torch.arange(len(ids) - (len(data.sample(index)[0]) - answer), len(ids))
        total -= logits[places - 1, ids[places]].sum().item()
        tokens += len(places)
    assert scalars(output, "ppl")[-1][1] == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_training_lowers_the_loss_and_leaves_the_base_alone(trained, checkpoint):
    losses = [value for _, value in scalars(trained[0], "train_loss")]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.1
    model = BaichuanForCausalLM.from_pretrained(checkpoint)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = PeftModel.from_pretrained(model, trained[1])
    for name, tensor in model.get_base_model().state_dict().items():
        if "lora" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")])


@pytest.mark.parametrize(
    "variant",
    [
        ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 8],
        ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2],
        ["--max_pack_len", 256],
        ["--packing", "none"],
        ["--packing", "none", "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 1],
        ["--gradient_checkpointing"],
        ["--gradient_checkpointing", "--packing", "none"],
        ["--attn_implementation", "eager"],
    ],
    ids=lambda variant: " ".join(map(str, variant)),
)
def test_the_same_training_however_it_is_split(trained, train_arguments, tmp_path, variant):
    train.main(train_arguments(tmp_path, *variant))
    compare_runs(trained[0], tmp_path)


def compare_runs(first, second):
    for name in ("train_loss", "grad_norm"):
        ours, theirs = (dict(scalars(output, name)) for output in (first, second))
        assert ours.keys() == theirs.keys()
        assert max(abs(ours[step] - theirs[step]) for step in ours) <= 1e-4 * (10 if name == "grad_norm" else 1)
    ours, theirs = (adapter_weights(output / "epoch-1-step-25") for output in (first, second))
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) <= 1e-4
    assert dict(scalars(first, "ppl"))[25] == pytest.approx(dict(scalars(second, "ppl"))[25], rel=1e-4)


def test_two_processes_under_the_launcher_train_alike(trained, train_arguments, tmp_path):
    """4 samples on each of two processes, whose rows differ in number and length."""
    more = ["--gradient_accumulation_steps", 2, "--max_pack_len", 256]
    run = launch(2, train_arguments(tmp_path, *more), timeout=300)
    assert run.returncode == 0, run.stderr
    compare_runs(trained[0], tmp_path)
    assert run.stdout.count("25 steps of 8 samples") == 1  # only one process speaks


BOOK = ["--ds_file", ROOT / "ds_zero2_no_offload.json", "--gradient_checkpointing", "--is_skip", "--lora_dropout", 0.1]


def test_the_books_command(train_arguments, tmp_path):
    """The project's own DeepSpeed file, dropout, checkpointing and skipping, through the launcher."""
    run = launch(1, train_arguments(tmp_path, *BOOK), timeout=300)
    assert run.returncode == 0, run.stderr
    dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32  # what this CPU has
    assert f"{str(dtype)[6:]} on 1 × cpu" in run.stdout
    assert ("this device has no bfloat16; training in float32" in run.stdout) == (dtype == torch.float32)
    weights = adapter_weights(tmp_path / "epoch-1-step-25")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    losses = [value for _, value in scalars(tmp_path, "train_loss")]
    assert losses[-1] < losses[0]


def test_the_books_command_in_bfloat16(train_arguments, tmp_path, capsys, monkeypatch):
    """The same on a CPU that is said to have bfloat16, whether it has it or emulates it."""
    monkeypatch.setattr(processes, "has_bfloat16", lambda: True)
    train.main(train_arguments(tmp_path, *BOOK))
    assert "bfloat16 on 1 × cpu" in capsys.readouterr().out
    weights = adapter_weights(tmp_path / "epoch-1-step-25")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    losses = [value for _, value in scalars(tmp_path, "train_loss")]
    assert losses[-1] < losses[0]


def test_dropout_acts_and_the_seed_decides(train_arguments, trained, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.main(train_arguments(tmp_path / name, "--lora_dropout", 0.3, "--seed", seed))
    a, b, c = ([value for _, value in scalars(tmp_path / name, "train_loss")] for name in "abc")
    assert a == b != c
    assert a != [value for _, value in scalars(trained[0], "train_loss")]


# ---------------------------------------------------------------- what is refused


def errors_of(capsys, arguments) -> list[str]:
    with pytest.raises(SystemExit) as error:
        train.main(arguments)
    assert error.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "/s]" not in line]
    assert all(line.startswith("error: ") for line in lines), lines
    return lines


def test_all_problems_are_reported_together(train_arguments, tmp_path, capsys):
    empty = tmp_path / "no model"
    empty.mkdir()
    wrong = ["--max_len", 0, "--lora_dropout", 1.5, "--learning_rate", -1, "--test_path", tmp_path / "none.json"]
    lines = errors_of(capsys, train_arguments(tmp_path / "out", *wrong, "--model_name_or_path", empty))
    for part in (
        "--max_len",
        "--lora_dropout",
        "--learning_rate",
        "none.json",
        "no model: has no weights",
        "tokenizer",
    ):
        assert any(part in line for line in lines), part
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (["--packing", "sideways"], "--packing"),
        (["--num_train_epochs", "1.5"], "--num_train_epochs"),
        (["--warmup_ratio", "nan"], "--warmup_ratio"),
        (["--no_such_flag"], "--no_such_flag"),
        (["--max_pack_len", 100], "--max_pack_len 100 is less than --max_len 256"),
        (["--max_len", 40], "train.json: 0 of 204 samples fit"),
        (["--max_src_len", 1, "--is_skip"], "train.json: 0 of 204 samples fit"),
        (["--per_device_train_batch_size", 500], "2000 are needed"),
        (["--attn_implementation", "flash_attention_2"], "--packing none"),
        (["--model_name_or_path", "nowhere"], "nowhere: there is no such directory"),
        (["--ds_file", "nowhere.json"], "nowhere.json"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_arguments(train_arguments, tmp_path, capsys, change, message):
    lines = errors_of(capsys, train_arguments(tmp_path / "out", *change))
    assert any(message in line for line in lines), lines
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ("{", "not JSON"),
        ("[]", "one JSON object"),
        ({"scheduler": {}}, "remove scheduler"),
        ({"train_batch_size": 8}, "remove train_batch_size"),
        ({"zero_optimization": {"stage": 3}}, "stage must be 2"),
        ({"zero_optimization": 2}, "zero_optimization must be an object"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "not both"),
        ({"bf16": {"enabled": "auto"}}, "must be true or false"),
        ({"optimizer": {}}, "optimizer.type is missing"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 10**30}}, "is too large"),
        ({"gradient_clipping": "1"}, "gradient_clipping must be a number"),
    ],
)
def test_wrong_deepspeed_files(train_arguments, tmp_path, capsys, change, message):
    path = tmp_path / "ds.json"
    path.write_text(change if isinstance(change, str) else json.dumps(FLOAT32 | change))
    lines = errors_of(capsys, train_arguments(tmp_path / "out", "--ds_file", path))
    assert any(str(path) in line and message in line for line in lines), lines


def test_weights_that_do_not_fit_are_named(train_arguments, checkpoint, tmp_path, capsys):
    directory = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    first, *others = errors_of(capsys, train_arguments(tmp_path / "out", "--model_name_or_path", directory))
    assert "has shape" in first and "(2000, 128)" in "".join([first, *others])
    assert len(others) == 5 and "more problems like these" in others[-1]
    assert not (tmp_path / "out").exists()


def test_the_launcher_prints_each_problem_once(train_arguments, tmp_path):
    run = launch(2, train_arguments(tmp_path / "out", "--max_len", 0), timeout=120)
    assert run.returncode == 2
    assert (run.stdout + run.stderr).count("error: --max_len") == 1
    assert "Traceback" not in run.stderr
