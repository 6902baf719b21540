"""train.py as a user starts it: in one process, under the launcher, in two processes; and what it refuses to start."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FLOAT32, ROOT, adapter_weights, alone, free_port, labelled, scalars
from peft import LoraConfig, PeftModel, get_peft_model

import train
import utils
from baichuan import BaichuanForCausalLM, modeling_baichuan
from support.dialogues.samples import read_samples
from support.model.adapter import training_record
from support.model.directory import ModelDirectory
from support.training import processes

LAUNCHER = Path(sys.executable).parent / "deepspeed"


def launch(processes: int, arguments: list[str], **options) -> subprocess.CompletedProcess:
    command = [LAUNCHER, "--num_gpus", processes, "--master_port", free_port(), "train.py", *arguments]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def trained(train_arguments, tmp_path_factory):
    """An epoch of 5 steps with rows of trees; `(output_dir, its adapter's directory)`."""
    output = tmp_path_factory.mktemp("trained")
    train.main(train_arguments(output, "--save_model_step", 2))
    return output, output / "epoch-1-step-5"


@pytest.fixture(scope="module")
def data_of(checkpoint):
    """data_of(path) → the samples of a file under the limits of `train_arguments`."""
    return lambda path: utils.RoleDataset(read_samples(path), ModelDirectory(checkpoint).tokenizer, 256, 128)


# ---------------------------------------------------------------- what is trained


def plain_training(
    checkpoint, data, dropout, weight_decay, clipping, rate, samples_a_step, steps, seed=1234
) -> list[dict]:
    """What train.py does, without what it does it with: transformers' labels, sample after sample, and torch alone.

    Returns each step's mean loss over supervised tokens, learning rate, gradient norm before clipping and adapters.
    """
    torch.manual_seed(seed)
    base = BaichuanForCausalLM.from_pretrained(checkpoint)
    lora = LoraConfig(
        r=16,
        lora_alpha=64,
        lora_dropout=dropout,
        target_modules=["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=weight_decay)
    curve = [1, *(0.1 + 0.45 * (1 + math.cos(math.pi * k / (steps - 1))) for k in range(1, steps)), 0]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, curve.__getitem__)
    order, found = utils.Steps(data, None, samples_a_step, 1, seed), []
    for step in range(1, steps + 1):
        torch.manual_seed(seed * 1_000_003 + step)  # another mask of dropout in every step
        indices = order.samples(step - 1)
        tokens, total = int(data.supervised[indices].sum()), 0.0
        for index in indices:
            ids, pairs = map(torch.from_numpy, data.sample(index))
            logits = model(ids[None]).logits[0, pairs[:, 0]].float()
            loss = torch.nn.functional.cross_entropy(logits, pairs[:, 1], reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, clipping or math.inf).item()
        numbers = {"train_loss": total, "learning_rate": schedule.get_last_lr()[0], "grad_norm": norm}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        adapters = {
            name.replace(".default", ""): parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        found.append(numbers | {"adapters": adapters})
    return found


# Large enough that each of them shows in the fifth digit or earlier.
PLAIN = {"weight_decay": 5.0, "clipping": 0.2, "rate": 5e-3, "samples_a_step": 4, "steps": 10}


@pytest.mark.parametrize("dropout", [0, 0.3])
def test_equals_plain_torch(checkpoint, few_samples, train_arguments, data_of, tmp_path, dropout):
    """Adapters and curves, with everything that could change the mode of the model or the random numbers on the way.

    With dropout the rows hold one sample each, since only then do its masks fall on the same numbers.
    """
    ds_file = tmp_path / "ds.json"
    ds_file.write_text(json.dumps(FLOAT32 | {"gradient_clipping": PLAIN["clipping"]}))
    rows = (
        ["--packing", "none", "--per_device_train_batch_size", 1] if dropout else ["--per_device_train_batch_size", 1]
    )
    flags = ["--gradient_accumulation_steps", 4, "--lora_dropout", dropout, "--weight_decay", PLAIN["weight_decay"]]
    flags += ["--learning_rate", PLAIN["rate"], "--ds_file", ds_file, "--gradient_checkpointing"]
    flags += ["--show_loss_step", 2, "--save_model_step", 4, "--sample_answers", 1]
    output = tmp_path / "run"
    train.main(train_arguments(output, *rows, *flags))
    expected = plain_training(checkpoint, data_of(few_samples[0]), dropout, **PLAIN)
    assert max(numbers["grad_norm"] for numbers in expected) > 2 * PLAIN["clipping"]

    for step, loss in scalars(output, "train_loss"):  # a mean over two steps
        pair = [numbers["train_loss"] for numbers in expected[step - 2 : step]]
        assert loss == pytest.approx(sum(pair) / 2, abs=2e-5) and abs(pair[0] - pair[1]) > 1e-3, step
    for name in ("learning_rate", "grad_norm"):
        values = scalars(output, name)
        assert [step for step, _ in values] == [2, 4, 6, 8, 10]
        for step, value in values:
            assert value == pytest.approx(expected[step - 1][name], rel=1e-3 if name == "grad_norm" else 1e-6), name
    for step in (4, 8, 10):
        ours = adapter_weights(output / f"epoch-1-step-{step}")
        theirs = expected[step - 1]["adapters"]
        assert ours.keys() == theirs.keys()
        for name in ours:
            difference = (ours[name] - theirs[name]).norm() / theirs[name].norm()
            assert difference <= 1e-3, (step, name, difference)


def test_writes_adapters_curves_and_arguments(trained, checkpoint):
    output, last = trained
    names = sorted(path.name for path in output.iterdir())
    assert [name for name in names if name.startswith("epoch")] == [f"epoch-1-step-{n}" for n in (2, 4, 5)]
    assert json.loads((output / "train_args.json").read_text())["lora_dim"] == 16
    names = "train_loss learning_rate grad_norm samples_per_second tokens_per_second peak_memory_gb"
    for name in names.split():
        assert [step for step, _ in scalars(output, name)] == [1, 2, 3, 4, 5], name
    assert [step for step, _ in scalars(output, "ppl")] == [2, 4, 5]
    rates = zip(scalars(output, "tokens_per_second"), scalars(output, "samples_per_second"))
    assert all(20 < tokens / samples < 256 for (_, tokens), (_, samples) in rates)  # tokens of a sample
    files = {path.name for path in last.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.model", "tokenizer_config.json"} <= files
    weights = adapter_weights(last)
    assert len(weights) == 2 * 5 * 2  # A and B of five linear layers in each of two decoder layers
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in weights)
    config = json.loads((last / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (16, 64, checkpoint)
    assert training_record(last) == {"base": ModelDirectory(checkpoint).fingerprint, "load_in_4bit": False}
    assert not [path for path in output.rglob("*") if ".tmp" in path.name]


@pytest.mark.parametrize(
    "step, total, ratio, factor",
    [(1, 100, 0.03, 1 / 3), (3, 100, 0.03, 1), (100, 100, 0.03, 0.1), (1, 1, 0.5, 1), (1, 5, 0, 1), (3, 5, 0, 0.55)],
)
def test_learning_rate_by_hand(step, total, ratio, factor):
    assert train.learning_rate_factor(step, total, ratio) == pytest.approx(factor)


def test_perplexity_is_that_of_the_saved_adapter(trained, checkpoint, few_samples, data_of):
    """Loaded by PEFT on the base, sample by sample: the value in the log is exact."""
    output, last = trained
    data = data_of(few_samples[1])
    model = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), last).eval()
    total, tokens = 0.0, 0
    for index in range(len(data)):
        ids, labels = labelled(data, index)
        logits = model(ids[None]).logits[0].log_softmax(-1)
        (columns,) = torch.nonzero(labels != -100, as_tuple=True)
        total -= logits[columns - 1, ids[columns]].sum().item()
        tokens += len(columns)
    assert scalars(output, "ppl")[-1][1] == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_training_leaves_the_base_alone(trained, checkpoint):
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
    ours, theirs = (adapter_weights(output / "epoch-1-step-5") for output in (first, second))
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) <= 1e-4
    assert dict(scalars(first, "ppl"))[5] == pytest.approx(dict(scalars(second, "ppl"))[5], rel=1e-4)


def test_two_processes_under_the_launcher_train_alike(trained, train_arguments, tmp_path):
    """4 samples on each of two processes, whose rows differ in number and length."""
    more = ["--gradient_accumulation_steps", 2, "--max_pack_len", 256]
    run = launch(2, train_arguments(tmp_path, *more), timeout=300)
    assert run.returncode == 0, run.stderr
    compare_runs(trained[0], tmp_path)
    heard, alone = (dict(scalars(output, "who_said_it_margin")) for output in (tmp_path, trained[0]))
    assert heard.keys() <= alone.keys() and heard[5] == pytest.approx(alone[5], abs=1e-3)
    assert run.stdout.count("5 steps of 8 samples") == 1  # only one process speaks


@pytest.fixture
def watched_steps(monkeypatch):
    """A list that each step of train.py adds to: what is true of the model and the optimizer while it computes."""
    found, train_step, forward = [], train.train_step, modeling_baichuan.MLP.forward

    def counted(mlp, *args):
        if found:
            found[-1]["MLP calls"] += torch.is_grad_enabled()  # not those of evaluation and answers
        return forward(mlp, *args)

    def watched(engine, batches, *args, **kwargs):
        (group,) = engine.optimizer.param_groups
        dropouts = [module for module in engine.module.modules() if isinstance(module, torch.nn.Dropout)]
        found.append(
            {
                "training": all(module.training for module in engine.module.modules()),
                "dropout": {module.p for module in dropouts},
                "dropouts": len(dropouts),
                "weight decay": group["weight_decay"],
                "clipping": engine.gradient_clipping(),
                "batches": len(batches),
                "MLP calls": 0,
            }
        )
        return train_step(engine, batches, *args, **kwargs)

    monkeypatch.setattr(modeling_baichuan.MLP, "forward", counted)
    monkeypatch.setattr(train, "train_step", watched)
    return found


BOOK = ["--ds_file", ROOT / "ds_zero2_no_offload.json", "--gradient_checkpointing", "--is_skip", "--lora_dropout", 0.1]
BOOK += ["--weight_decay", 0.1]


def test_the_books_command(train_arguments, watched_steps, tmp_path, capsys, monkeypatch):
    """Each flag is at work in every step, and in bfloat16 on a CPU that is said to have it, whether it has it or not."""
    monkeypatch.setattr(processes, "has_bfloat16", lambda: True)
    train.main(train_arguments(tmp_path, *BOOK, "--save_model_step", 2))
    assert "bfloat16 on 1 × cpu" in capsys.readouterr().out
    weights = adapter_weights(tmp_path / "epoch-1-step-5")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert len(watched_steps) == 5
    for step in watched_steps:
        assert step["training"] and step["dropout"] == {0.1} and step["dropouts"] == 10
        assert (step["weight decay"], step["clipping"]) == (0.1, 1.0)
        assert step["MLP calls"] == 2 * 2 * step["batches"], "forward, and again in the backward pass"


def test_the_books_command_under_the_launcher(train_arguments, tmp_path):
    """On what this CPU has, it is the same run to the last bit as without the launcher."""
    arguments = [*BOOK, "--sample_answers", 0]
    run = launch(1, train_arguments(tmp_path / "launched", *arguments), timeout=300)
    assert run.returncode == 0, run.stderr
    dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    assert f"{str(dtype)[6:]} on 1 × cpu" in run.stdout
    assert ("this device has no bfloat16; training in float32" in run.stdout) == (dtype == torch.float32)
    command = [sys.executable, "train.py", *train_arguments(tmp_path / "alone", *arguments)]
    subprocess.run(command, cwd=ROOT, env=alone(), check=True, capture_output=True, timeout=300)
    ours, theirs = (adapter_weights(tmp_path / name / "epoch-1-step-5") for name in ("launched", "alone"))
    assert {tensor.dtype for tensor in ours.values()} == {dtype}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("train_loss", "grad_norm", "ppl"):
        assert scalars(tmp_path / "launched", name) == scalars(tmp_path / "alone", name)


def test_the_seed_decides(train_arguments, trained, tmp_path):
    """Adapters, order and masks: the same seed gives the same run, another seed another order of samples."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.main(train_arguments(tmp_path / name, "--lora_dropout", 0.3, "--seed", seed, "--sample_answers", 0))
    a, b, c = (scalars(tmp_path / name, "train_loss") for name in "abc")
    assert a == b != c


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
        (["--max_len", 40], "train.json: 0 of 41 samples fit"),
        (["--max_src_len", 1, "--is_skip"], "train.json: 0 of 41 samples fit"),
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
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}}, "DeepSpeed refuses the configuration"),
        ({"optimizer": {"type": "Adamant"}}, "DeepSpeed refuses the configuration"),
        ({"optimizer": {"type": "AdamW", "params": {"momentum": 1}}}, "DeepSpeed refuses the configuration"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": 3}}}, "DeepSpeed refuses the configuration"),
        ({"data_types": {"grad_accum_dtype": "bogus"}}, "DeepSpeed refuses the configuration"),
        (
            {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
            "data_types.grad_accum_dtype needs zero_optimization.stage 2",
        ),
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


@pytest.mark.parametrize("error", [AttributeError, TypeError, ValueError])
def test_a_defect_is_not_blamed_on_the_deepspeed_file(train_arguments, tmp_path, monkeypatch, error):
    """It keeps its traceback, wherever in DeepSpeed's start it is."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    def fail(*_, **__):
        raise error("a defect")

    monkeypatch.setattr(DeepSpeedEngine, "_configure_zero_optimizer", fail)
    with pytest.raises(error, match="a defect"):
        train.main(train_arguments(tmp_path))


def test_a_test_loss_that_is_no_number_names_the_test_set(train_arguments, few_samples, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.utils, "evaluation", lambda *_: math.nan)
    with pytest.raises(SystemExit) as ended:
        train.main(train_arguments(tmp_path))
    (line,) = re.findall("error: .*", capsys.readouterr().err)
    assert ended.value.code == 2
    assert line.startswith(f"error: {few_samples[1]}: the loss after step 5 is nan; lower --learning_rate")
    assert "with samples" not in line and few_samples[0] not in line


def test_a_role_that_loses_all_of_its_samples_is_named(train_arguments, few_samples, tmp_path, capsys):
    path = tmp_path / "train.json"
    long = [{"role": "话痨", "system": "", "prompt": "说" * 200, "response": "好"}] * 2
    with open(path, "w", encoding="utf-8") as file:
        file.write(Path(few_samples[0]).read_text(encoding="utf-8"))
        file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in long)
    train.main(train_arguments(tmp_path / "run", "--train_path", path, "--is_skip", "--dry_run"))
    out = capsys.readouterr().out
    assert f"warning: {path}: no sample is left of 话痨: allow more tokens" in out


def test_what_answers_leaves_the_compiler_to_training(train_arguments, tmp_path, monkeypatch):
    graphs, module_compile = [], torch.nn.Module.compile  # of each graph whether gradients go through it

    def backend(graph, inputs):  # as the graph stands, since a machine may have no compiler
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    def compile_layer(layer, dynamic):
        assert dynamic
        module_compile(layer, dynamic=dynamic, backend=backend)

    def answering(answer):
        def watched(*arguments):
            before = len(graphs)
            answers = answer(*arguments)
            assert len(graphs) == before  # of eight that a function may have, else training would find none left
            return answers

        return watched

    monkeypatch.setattr(torch.nn.Module, "compile", compile_layer)
    monkeypatch.setattr(ModelDirectory, "refuse_to_fail_later", answering(ModelDirectory.refuse_to_fail_later))
    monkeypatch.setattr(train, "sample_answers", answering(train.sample_answers))
    train.main(train_arguments(tmp_path / "compiled", "--compile"))
    assert any(graphs), "no row that trains was compiled"
    monkeypatch.undo()
    train.main(train_arguments(tmp_path / "as written"))
    ours, theirs = (adapter_weights(tmp_path / name / "epoch-1-step-5") for name in ("compiled", "as written"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


def test_the_launcher_prints_each_problem_once(train_arguments, tmp_path):
    run = launch(2, train_arguments(tmp_path / "out", "--max_len", 0), timeout=600)
    assert run.returncode == 2
    assert (run.stdout + run.stderr).count("error: --max_len") == 1
    assert "Traceback" not in run.stderr


def test_a_loss_scale_that_cannot_fall_further_stops_the_run():
    class Engine:
        def step(self):
            raise Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")

    assert math.isnan(train.update(Engine(), torch.float16))


def test_the_timer_that_would_synchronise_is_off(train_arguments, tmp_path, monkeypatch):
    """DeepSpeed takes the setting: at the start of a pass its timer does nothing."""
    import deepspeed

    engines, initialize = [], deepspeed.initialize

    def watched(**arguments):
        engines.append(initialize(**arguments)[0])
        return (engines[0],)

    monkeypatch.setattr(deepspeed, "initialize", watched)
    train.main(train_arguments(tmp_path, "--ds_file", ROOT / "ds_zero2_no_offload.json", "--sample_answers", 0))
    assert engines[0].tput_timer.config.enabled is False and engines[0].tput_timer.start_time == 0


def test_answers_are_shown_once_all_is_saved(train_arguments, tmp_path, monkeypatch):
    """They may take long, or fail; the state that --resume goes on from does not wait for them."""
    seen = []

    def watched(*arguments):
        seen.append([(tmp_path / place / "epoch-1-step-5").exists() for place in ("", "state")])
        return {}

    monkeypatch.setattr(train, "sample_answers", watched)
    train.main(train_arguments(tmp_path))
    assert seen == [[True, True]]
