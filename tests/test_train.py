"""train.py as a user starts it: in one process, under the launcher, in two processes; and what it refuses to start."""

import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import FLOAT32, ROOT, adapter_weights, labelled, scalars
from peft import LoraConfig, PeftModel, get_peft_model

import train
import utils
from baichuan import BaichuanForCausalLM, modeling_baichuan
from support.dialogues.samples import read_samples
from support.files import followed
from support.model.adapter import training_record
from support.model.directory import ModelDirectory
from support.training import arguments, processes
from tests.forked import run_to_the_end


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


def plain_training(checkpoint, data, dropout, weight_decay, clipping, rate, samples_a_step, steps, seed) -> list[dict]:
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
PLAIN = {"weight_decay": 5.0, "clipping": 0.2, "rate": 5e-3, "samples_a_step": 4, "steps": 10, "seed": 5}


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
    flags += ["--show_loss_step", 2, "--save_model_step", 4, "--eval_steps", 3, "--sample_answers", 1, "--seed", 5]
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
    losses = dict(scalars(output, "test_loss"))
    assert list(losses) == [3, 4, 6, 8, 9, 10]
    saved = {step: losses[step] for step in (4, 8, 10)}
    assert followed(output / "best").name == f"epoch-1-step-{min(saved, key=saved.get)}"
    for step in saved:
        ours = adapter_weights(output / f"epoch-1-step-{step}")
        theirs = expected[step - 1]["adapters"]
        assert ours.keys() == theirs.keys()
        for name in ours:
            difference = (ours[name] - theirs[name]).norm() / theirs[name].norm()
            assert difference <= 1e-3, (step, name, difference)


def test_writes_adapters_curves_and_arguments(trained, checkpoint):
    output, last = trained
    assert sorted(path.name for path in output.glob("epoch*")) == [f"epoch-1-step-{n}" for n in (2, 4, 5)]
    assert json.loads((output / "train_args.json").read_text())["lora_dim"] == 16
    names = "train_loss learning_rate grad_norm samples_per_second tokens_per_second peak_memory_gb"
    for name in names.split():
        assert [step for step, _ in scalars(output, name)] == [1, 2, 3, 4, 5], name
    assert [step for step, _ in scalars(output, "ppl")] == [2, 4, 5]
    rates = zip(scalars(output, "tokens_per_second"), scalars(output, "samples_per_second"))
    assert all(20 < tokens / samples < 256 for (_, tokens), (_, samples) in rates)  # tokens of a sample
    assert {"tokenizer.model", "tokenizer_config.json"} <= {path.name for path in last.iterdir()}
    config = json.loads((last / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (16, 64, checkpoint)
    assert training_record(last) == {"base": ModelDirectory(checkpoint).fingerprint}
    assert not [path for path in output.rglob("*") if ".tmp" in path.name]


@pytest.mark.parametrize(
    "step, total, ratio, factor",
    [
        *(
            (1, 100, 0.03, 1 / 3),
            (3, 100, 0.03, 1),
            (100, 100, 0.03, 0.1),
            (1, 1, 0.5, 1),
            (1, 5, 0, 1),
            (3, 5, 0, 0.55),
        ),
        *((1, 60, 0.03, 1 / 2), (1, 80, 0.03, 1 / 2)),  # 1.8 and 2.4 steps of warm-up are rounded
    ],
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


@pytest.mark.parametrize(
    "variant",
    [
        ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 8, "--max_pack_len", 256],
        ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--attn_implementation", "eager"],
        ["--packing", "none", "--gradient_checkpointing"],
    ],
    ids=lambda variant: " ".join(map(str, variant)),
)
def test_the_same_training_however_it_is_split(trained, train_arguments, tmp_path, variant):
    train.main(train_arguments(tmp_path, *variant, "--sample_answers", 0))
    compare_runs(trained[0], tmp_path)


def compare_runs(first, second):
    for name in ("train_loss", "grad_norm"):
        ours, theirs = (dict(scalars(output, name)) for output in (first, second))
        assert ours.keys() == theirs.keys()
        assert max(abs(ours[step] - theirs[step]) for step in ours) <= 1e-4 * (10 if name == "grad_norm" else 1)
    ours, theirs = (adapter_weights(output / "epoch-1-step-5") for output in (first, second))
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) <= 1e-4
    assert dict(scalars(first, "ppl"))[5] == pytest.approx(dict(scalars(second, "ppl"))[5], rel=1e-4)


def test_two_processes_train_alike(trained, train_arguments, tmp_path):
    """4 samples on each of two processes, whose rows differ in number and length."""
    more = ["--gradient_accumulation_steps", 2, "--max_pack_len", 256]
    statuses, printed = run_to_the_end("train.py", *train_arguments(tmp_path, *more), processes=2)
    assert statuses == [0, 0], printed
    compare_runs(trained[0], tmp_path)
    heard, alone = (dict(scalars(output, "who_said_it_margin")) for output in (tmp_path, trained[0]))
    assert heard.keys() <= alone.keys() and heard[5] == pytest.approx(alone[5], abs=1e-3)
    assert printed.count("5 steps of 8 samples") == 1  # only one process speaks
    tokens = []  # of a sample: the seconds of both rates are the same
    for output in (tmp_path, trained[0]):
        rates = zip(scalars(output, "tokens_per_second"), scalars(output, "samples_per_second"), strict=True)
        tokens.append(sum(tokens_s / samples_s for (_, tokens_s), (_, samples_s) in rates) / 5)
    assert 0.75 < tokens[0] / tokens[1] < 1.5  # shorter rows share less; one process alone would count half or twice


BOOK = ["--ds_file", ROOT / "ds_zero2_no_offload.json", "--gradient_checkpointing", "--is_skip", "--lora_dropout", 0.1]
BOOK += ["--weight_decay", 0.1]


def test_the_books_command(train_arguments, tmp_path, capsys, monkeypatch):
    """In bfloat16 on a CPU that is said to have it, whether it has it or not. Layers compute twice: checkpointing."""
    calls, watched, train_step, forward = [], [], train.train_step, modeling_baichuan.MLP.forward

    def counted(mlp, *args):
        calls.append(mlp.training)
        return forward(mlp, *args)

    def watch(engine, batches, *args, **kwargs):
        calls.clear()
        result = train_step(engine, batches, *args, **kwargs)
        assert calls == [True] * 2 * 2 * len(batches), "forward, and again in the backward pass"
        watched.append((engine.gradient_clipping(), engine.tput_timer.config.enabled))
        return result

    monkeypatch.setattr(modeling_baichuan.MLP, "forward", counted)
    monkeypatch.setattr(train, "train_step", watch)
    monkeypatch.setattr(processes, "has_bfloat16", lambda: True)
    train.main(train_arguments(tmp_path, *BOOK, "--save_model_step", 2))
    printed = capsys.readouterr().out
    assert "bfloat16 on 1 × cpu" in printed
    told = re.findall(r"epoch-1-step-(\d): perplexity ([\d.]+) \(loss ([\d.]+)\)", printed)
    for (step, perplexity, loss), (logged, ppl) in zip(told, scalars(tmp_path, "ppl"), strict=True):
        assert (int(step), float(perplexity)) == (logged, pytest.approx(ppl, rel=1e-6, abs=6e-4))
        assert float(loss) == pytest.approx(math.log(ppl), abs=6e-5)
    assert watched == [(1.0, False)] * 5  # the timer would wait for the device at each step
    weights = adapter_weights(tmp_path / "epoch-1-step-5").values()
    assert {tensor.dtype for tensor in weights} == {torch.bfloat16}
    state = (tmp_path / "state/epoch-1-step-5/process-0.pt").stat().st_size
    assert 0 < state - 14 * sum(map(torch.Tensor.numel, weights)) < 20_000  # as docs/resuming.md says
    (tmp_path / "touched").touch()  # safetensors would let nobody else read what it writes
    assert len({path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}) == 1


def test_what_answers_leaves_the_compiler_to_training(trained, train_arguments, tmp_path, monkeypatch):
    """And all is saved before the answers, which may take long or fail."""
    graphs, module_compile = [], torch.nn.Module.compile  # of each graph whether gradients go through it

    def backend(graph, inputs):  # as the graph stands, since a machine may have no compiler
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    def compile_layer(layer, dynamic):
        assert dynamic
        module_compile(layer, dynamic=dynamic, backend=backend)

    def answering(answer, is_saved):
        def watched(*arguments):
            before = len(graphs)
            assert [(tmp_path / place / "epoch-1-step-5").exists() for place in ("", "state")] == [is_saved] * 2
            answers = answer(*arguments)
            assert len(graphs) == before  # of eight that a function may have, else training would find none left
            return answers

        return watched

    monkeypatch.setattr(arguments, "missing_compiler", lambda on_gpu: None)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_layer)
    monkeypatch.setattr(ModelDirectory, "refuse_to_fail_later", answering(ModelDirectory.refuse_to_fail_later, False))
    monkeypatch.setattr(train, "generate_sample_answers", answering(train.generate_sample_answers, True))
    train.main(train_arguments(tmp_path, "--compile"))
    assert any(graphs), "no row that trains was compiled"
    ours, theirs = (adapter_weights(output / "epoch-1-step-5") for output in (tmp_path, trained[0]))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


class Engine:
    """One whose step ends as DeepSpeed's does: with the norm of a gradient, or an error."""

    optimizer = SimpleNamespace(overflow=True)

    def __init__(self, norm):
        self.norm = norm

    def step(self):
        if self.norm == "lowest scale":
            raise Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")

    def get_global_grad_norm(self):
        return self.norm


def test_a_norm_that_is_no_number_stops_the_run_and_an_overflow_that_is_handled_does_not():
    norms = [0.0, 2.5, -1.0, math.inf, math.nan]  # DeepSpeed's -1 is of an overflow
    given = [None, torch.tensor(2.5), *norms[2:]]  # None: its configuration asks for no norm
    for dtype, good in ((torch.bfloat16, 2), (torch.float32, 2), (torch.float16, 5)):
        found = [train.update(Engine(norm), dtype, torch.tensor([0.5, 2.0, 0.0])) for norm in given]
        assert {told[:2] for told in found} == {(0.5, True)}  # loss, stop
        found = [norm for _, _, norm in found]
        assert found[:good] == pytest.approx(norms[:good], nan_ok=True) and all(map(math.isnan, found[good:])), dtype
    loss, stop, norm = train.update(Engine("lowest scale"), torch.float16, torch.tensor([0.5, 0.0, 0.0]))
    assert (loss, stop) == (0.5, False) and math.isnan(norm)


# ---------------------------------------------------------------- what is refused


def test_all_problems_are_reported_together(train_arguments, tmp_path):
    empty = tmp_path / "no model"
    empty.mkdir()
    wrong = ["--model_name_or_path", empty, "--test_path", tmp_path / "none.json", "--ds_file", "nowhere.json"]
    wrong += ["--max_pack_len", 100, "--attn_implementation", "flash_attention_2"]
    with pytest.raises(train.UserError) as refused:
        train.read_inputs(train.parse_args(train_arguments(tmp_path / "out", *wrong)))
    told = "\n".join(refused.value.problems)
    for part in ("no model/config.json: is missing", "none.json", "nowhere.json", "--packing none"):
        assert part in told
    assert "--max_pack_len 100 is less than --max_len 256" in told and not (tmp_path / "out").exists()


def test_a_sample_may_fill_the_models_context(train_arguments, checkpoint):
    args = train.parse_args(train_arguments("out", "--max_len", 4096))
    arguments.refuse_wrong_arguments(args, ModelDirectory(checkpoint))
    args.max_len = 4097
    with pytest.raises(train.UserError, match="--max_len 4097 exceeds the model's model_max_length, 4096"):
        arguments.refuse_wrong_arguments(args, ModelDirectory(checkpoint))


def test_what_compiles_needs_a_compiler_and_python_h(train_arguments, tmp_path, monkeypatch):
    """C++ on the CPU, where flex_attention has no backward pass, and C on a GPU."""

    def problems(*flags):
        try:
            train.read_inputs(train.parse_args(train_arguments(tmp_path / "out", *flags)))
        except train.UserError as refused:
            return refused.problems

    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    header, flex = tmp_path / "Python.h", ["--attn_implementation", "flex_attention"]
    remedy = f", and {header}: apt-get install g++ python3.{sys.version_info[1]}-dev"
    cases = (False, "g++", "CXX", "g++"), (True, "clang", "CC", "gcc or clang")
    for has_gpu, compiler, variable, needed in cases:
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        refused = [f"--compile and flex_attention need {needed}{remedy}"]
        assert problems() is None and problems("--compile") == refused
        (tmp_path / compiler).touch(0o755)
        assert problems("--compile") == refused
        header.touch()
        assert problems("--compile") is None
        monkeypatch.setenv(variable, "no-compiler")
        assert problems("--compile") == [f"--compile and flex_attention need no-compiler{remedy}"]
        monkeypatch.delenv(variable)
        header.unlink()
        assert problems(*flex) == (refused if has_gpu else [f"{' '.join(flex)}: trains on a GPU only: take sdpa"])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # the GPU is there, and not used
    assert problems("--compile") == [f"--compile and flex_attention need g++{remedy}"]


def test_numbers_out_of_their_range_are_refused():
    wrong = dict.fromkeys(("save_model_step", "eval_steps", "sample_answers", "seed", "weight_decay"), -1)
    wrong |= dict.fromkeys(("max_len", "max_src_len", "lora_dim", "num_train_epochs", "show_loss_step"), 0)
    wrong |= dict.fromkeys(("max_pack_len", "save_total_limit", "patience", "learning_rate", "lora_alpha"), 0)
    wrong |= dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), 0)
    for name, value in [*wrong.items(), ("lora_dropout", 1), ("warmup_ratio", "nan"), ("packing", "sideways")]:
        with pytest.raises(train.UserError, match=f"argument --{name}: "):
            train.parse_args([f"--{name}={value}"])


def test_samples_that_do_not_fit(train_arguments, few_samples, checkpoint, capsys):
    """The message names the cause: the limits, or the batch."""
    tokenizer, samples = ModelDirectory(checkpoint).tokenizer, list(read_samples(few_samples[0]))
    batch = "add samples, or lower --per_device_train_batch_size or --gradient_accumulation_steps"
    for flags, given, told in (
        (["--max_len", 40], samples, "0 of 41 samples fit; 8 are needed: allow more tokens than --max_len 40"),
        (["--max_src_len", 1, "--is_skip"], samples, "0 of 41 samples fit; 8 are needed: allow more tokens"),
        (["--per_device_train_batch_size", 20], samples, f"41 of 41 samples fit; 80 are needed: {batch}"),
        ([], [], "0 of 0 samples fit; 8 are needed: add samples"),
    ):
        args = train.parse_args(train_arguments("out", *flags))
        with pytest.raises(train.UserError, match=f"^t.json: {told}"):
            train.read_data(args, tokenizer, "t.json", given, train.step_size(args))
    assert len(train.read_data(args, tokenizer, "t.json", samples[:8], train.step_size(args))) == 8


def test_the_samples_of_a_step_that_fails_are_named(
    train_arguments, few_samples, data_of, tmp_path, capsys, monkeypatch
):
    """They are those whose answers stand in the step's rows."""
    learned = []

    def train_step(engine, batches, *_, stop):
        learned.append(sorted(token for batch in batches for token in batch["loss_positions"][:, 1].tolist()))
        return torch.tensor([math.nan if len(learned) == 2 else 1.0, 0.0, 0.0])

    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(train, "update", lambda engine, dtype, numbers: tuple(numbers.tolist()))
    with pytest.raises(SystemExit):
        train.main(train_arguments(tmp_path, "--sample_answers", 0))
    named = re.search("loss of step 2 is nan, .* with samples ([0-9, ]+); look", capsys.readouterr().err)[1]
    data = data_of(few_samples[0])
    pairs = [data.sample(int(number) - 1)[1] for number in named.split(", ")]  # all samples fit
    assert len(pairs) == 8 and learned[1] == sorted(token for own in pairs for token in own[:, 1].tolist())


@pytest.mark.parametrize(
    "change, message",
    [
        ("{", "not JSON"),
        ({"scheduler": {}, "train_batch_size": 8}, "remove scheduler, train_batch_size"),
        ({"zero_optimization": {"stage": 3}}, "stage must be 2"),
        ({"bf16": True}, "is not laid out like ds_zero2_no_offload.json"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled must be true or false"),
        (
            {"optimizer": {"type": "Muon", "params": {}}},
            "Muon looks at matrices, and adapters are one vector here",
        ),
        ({"optimizer": {"type": "AdamW", "params": 3}}, "is not laid out like ds_zero2_no_offload.json"),
        (
            {"gradient_clipping": "auto"},
            "not laid out like ds_zero2_no_offload.json: could not convert string to float",
        ),
    ],
)
def test_wrong_deepspeed_files(tmp_path, change, message):
    path = tmp_path / "ds.json"
    path.write_text(change if isinstance(change, str) else json.dumps(FLOAT32 | change))
    with pytest.raises(train.UserError) as error:
        arguments.read_deepspeed_config(path)
    assert str(path) in error.value.problems[0] and message in error.value.problems[0]


@pytest.mark.parametrize(
    "change",
    [
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}},
        {"optimizer": {"type": "AdamW", "params": {"momentum": 1}}},
        {"optimizer": {"type": "SGD", "params": {}}},
    ],
)
def test_what_deepspeed_refuses_is_one_line(train_arguments, tmp_path, checkpoint, change, monkeypatch):
    monkeypatch.setattr(processes, "has_bfloat16", lambda: True)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(FLOAT32 | change))
    args = train.parse_args(train_arguments(tmp_path / "out", "--ds_file", path))
    config = arguments.read_deepspeed_config(path)
    processes.join_processes()
    model = train.model_with_adapters(
        args, ModelDirectory(checkpoint), processes.precision(config), torch.device("cpu")
    )
    with pytest.raises(train.UserError, match=f"{path}: DeepSpeed refuses the configuration: ") as refused:
        train.start_engine(model, config, args, 5)
    assert "torch_adam" not in str(refused.value)
    if "SGD" in str(change):
        assert "zero_allow_untested_optimizer" in str(refused.value)
        path.write_text(json.dumps(FLOAT32 | change | {"zero_allow_untested_optimizer": True}))
        train.start_engine(model, arguments.read_deepspeed_config(path), args, 5)


def test_a_file_without_an_optimizer_gets_one_that_needs_no_compiler(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    config = arguments.read_deepspeed_config(tmp_path / "ds.json")
    assert config["optimizer"] == {"type": "AdamW", "params": {"torch_adam": True}}


def test_a_test_loss_that_is_no_number_names_the_test_set(train_arguments, few_samples, monkeypatch):
    monkeypatch.setattr(train.utils, "evaluation", lambda *_: math.nan)
    args, engine = train.parse_args(train_arguments("out")), SimpleNamespace(module=None, device=None)
    with pytest.raises(
        train.UserError, match=f"^{few_samples[1]}: the loss after step 5 is nan; lower --learning_rate"
    ):
        train.evaluate(args, engine, [], None, 5)
