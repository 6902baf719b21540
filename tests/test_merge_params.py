"""merge_params.py: the merged model is the trained one, it says so only when it is, and a failure leaves nothing behind."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import merge_params
import web_demo
from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from baichuan.generation_utils import messages_to_ids
from support.errors import UserError
from support.model.adapter import write_training
from support.model.comparison import compare
from support.model.directory import ModelDirectory
from support.model.weights import Weights, write_weights
from support.scores.candidates import Candidate

PROFILES = str(ROOT / "data/sample/profiles-zh_desc.json")
TARGETS = ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(checkpoint, directory: Path, dtype=torch.float32) -> Path:
    shutil.copytree(checkpoint, directory)
    BaichuanForCausalLM.from_pretrained(checkpoint, dtype=dtype).save_pretrained(directory)
    return directory


def make_adapter(base, directory: Path, spread=0.1, **settings) -> Path:
    """An adapter of `base` whose random B makes it change every answer."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(BaichuanForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=spread)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory) -> Path:
    return make_adapter(checkpoint, tmp_path_factory.mktemp("adapter") / "epoch-1-step-3")


@pytest.fixture(scope="module")
def merged(checkpoint, adapter, tmp_path_factory) -> Path:
    """The whole script, run as a user runs it."""
    directory = tmp_path_factory.mktemp("merged") / "epoch-1-step-3-merge"
    flags = ["--ori_model_dir", checkpoint, "--model_dir", adapter, "--save_model_dir", directory]
    subprocess.run([sys.executable, "merge_params.py", *flags], cwd=ROOT, check=True)
    return directory


def merge(base, adapter, target, *more):
    flags = ["--ori_model_dir", base, "--model_dir", adapter, "--save_model_dir", target, *more]
    merge_params.main([str(flag) for flag in flags])


def refusal(capsys, base, adapter, target, *more) -> str:
    """Run a merge that must fail with error lines alone, and leave nothing beside what was there. Returns the lines."""
    before = sorted(target.parent.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        merge(base, adapter, target, *more)
    errors = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert exit.value.code == 2
    assert errors
    assert sorted(target.parent.rglob("*")) == before
    return "\n".join(errors)


def logits(model, tokenizer) -> torch.Tensor:
    messages = [{"role": "system", "content": "你是船夫。"}, {"role": "user", "content": "今天能过江吗？\n1 + 1 = ?"}]
    with torch.no_grad():
        return model(torch.tensor([messages_to_ids(tokenizer, messages)])).logits.float()


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merged_weights_are_the_exact_sum_rounded_once(checkpoint, tmp_path, dtype):
    base = make_base(checkpoint, tmp_path / "base", dtype)
    adapter = make_adapter(base, tmp_path / "adapter", r=2, lora_alpha=7)
    merge(base, adapter, tmp_path / "merged")
    before, after = (load_file(directory / "model.safetensors") for directory in (base, tmp_path / "merged"))
    factors = load_file(adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    changed = 0
    for name, weight in before.items():
        assert after[name].dtype == dtype
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if prefix + "A.weight" not in factors:
            assert torch.equal(after[name], weight), name
            continue
        changed += 1
        a, b = (factors[f"{prefix}{factor}.weight"].double() for factor in "AB")
        exact = weight.double() + 7 / 2 * (b @ a)
        # Half a unit in the last place, and what float32 loses: any second rounding would exceed it somewhere.
        unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(1e-30)))) * torch.finfo(dtype).eps
        slack = {torch.float32: 8.0}.get(dtype, 0.502)  # float32 sums the product in another order
        assert ((after[name].double() - exact).abs() <= slack * unit + 1e-7).all(), name
    assert changed == 10  # 5 linear layers in each of 2 decoder layers


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.gate_proj": 40, "up_proj": 8}},
        {"target_modules": ["W_pack"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
        {"lora_alpha": 3.5, "lora_dropout": 0.5},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_recovered_from_the_adapter_give_what_peft_merges(checkpoint, tmp_path, settings):
    adapter = make_adapter(checkpoint, tmp_path / "adapter", **settings)
    merge(checkpoint, adapter, tmp_path / "merged")
    by_peft = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), adapter).merge_and_unload()
    for name, weight in load_file(tmp_path / "merged/model.safetensors").items():
        torch.testing.assert_close(weight, by_peft.state_dict()[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layout", ["bin", "bin shards", "legacy bin", "safetensors shards", "inv_freq"])
def test_every_layout_of_the_base_is_read_alike(checkpoint, adapter, merged, tmp_path, layout):
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    if layout == "safetensors shards":
        write_weights(base, tensors.items(), shard_bytes=100_000)
        assert len(list(base.glob("model-*.safetensors"))) > 3
    elif layout == "bin shards":
        files = {name: f"pytorch_model-{number % 3}.bin" for number, name in enumerate(tensors)}
        for file in set(files.values()):
            torch.save({name: tensors[name] for name in tensors if files[name] == file}, base / file)
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    elif layout == "inv_freq":
        save_file(
            tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}, base / "model.safetensors"
        )
    else:
        torch.save(tensors, base / "pytorch_model.bin", _use_new_zipfile_serialization=layout == "bin")
    found = dict(Weights(base))
    assert tensors.keys() == found.keys()
    assert all(torch.equal(tensors[name], found[name]) for name in tensors)
    if layout == "bin shards":  # the whole script on one of them: it has no other way to the weights
        merge(base, adapter, tmp_path / "merged")
        assert (tmp_path / "merged/model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


# ---------------------------------------------------------------- the result


def test_result_loads_and_chats_where_this_project_is_not(checkpoint, adapter, merged, tmp_path):
    """transformers alone, in an isolated interpreter elsewhere, gives the adapter's logits."""
    script = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
messages = [{"role": "system", "content": "你是船夫。"}, {"role": "user", "content": "今天能过江吗？\\n1 + 1 = ?"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
torch.save(model(ids).logits.detach(), sys.argv[2])
model.generation_config.max_new_tokens = 3
assert isinstance(model.chat(tokenizer, messages), str)
assert model.generation_config.user_token_id == 195 and model.generation_config.assistant_token_id == 196
assert "baichuan" not in sys.modules and "utils" not in sys.modules
"""
    command = [sys.executable, "-I", "-c", script, str(merged), str(tmp_path / "logits.pt")]
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    model = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), adapter).eval()
    expected = logits(model, BaichuanTokenizer.from_pretrained(checkpoint))
    assert (torch.load(tmp_path / "logits.pt") - expected).abs().max() < 1e-5
    assert (expected - logits(BaichuanForCausalLM.from_pretrained(checkpoint), BaichuanTokenizer.from_pretrained(checkpoint))).abs().max() > 0.1  # fmt: skip


def test_result_is_complete(checkpoint, merged):
    """What the base has, the result has; what the user set in its JSON files is there."""
    names = {path.name for path in Path(checkpoint).iterdir()}
    assert {path.name for path in merged.iterdir()} == names
    for name in ("generation_config.json", "tokenizer.model", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (Path(checkpoint) / name).read_bytes()
    before, after = (json.loads((Path(directory) / "config.json").read_text()) for directory in (checkpoint, merged))
    merge = after.pop("merged_adapter")
    assert after == before
    assert (merge["base"], merge["adapter"]) == ("Baichuan2-random", "epoch-1-step-3")


def test_generation_config_that_transformers_would_not_save(checkpoint, adapter, tmp_path):
    """Sampling settings without do_sample are refused by save_pretrained (transformers #29988); the file is copied."""
    base = make_base(checkpoint, tmp_path / "base")
    settings = json.loads((base / "generation_config.json").read_text()) | {"do_sample": False, "temperature": 0.3}
    (base / "generation_config.json").write_text(json.dumps(settings))
    merge(base, adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged/generation_config.json").read_text()) == settings


def test_large_results_are_sharded(checkpoint, adapter, merged, tmp_path, monkeypatch):
    monkeypatch.setattr(write_weights, "__defaults__", (200_000,))
    merge(checkpoint, adapter, tmp_path / "merged")
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == Weights(merged).bytes
    found = BaichuanForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    expected = BaichuanForCausalLM.from_pretrained(merged).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---------------------------------------------------------------- the proof


def test_comparison_against_numpy():
    generator = np.random.default_rng(0)
    p, q = ([generator.normal(0, 2, (n, 50)) for n in (3, 5)] for _ in range(2))
    q[0][:] = p[0]
    result = compare([torch.tensor(x) for x in p], [torch.tensor(x) for x in q])
    softmax = [[np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in side] for side in (p, q)]
    divergence = np.concatenate([(a * np.log(a / b)).sum(-1) for a, b in zip(*softmax)])
    assert result.largest == pytest.approx(np.abs(p[1] - q[1]).max())
    assert result.divergence == pytest.approx(divergence.mean())
    assert result.same_argmax == pytest.approx((3 + (p[1].argmax(-1) == q[1].argmax(-1)).sum()) / 8)
    assert result.worst == 1


def test_comparison_does_not_pass_over_nan():
    good, bad = torch.zeros(2, 4), torch.zeros(2, 4)
    bad[1, 2] = torch.nan
    assert compare([good], [bad]).largest == torch.inf


@pytest.mark.parametrize(
    "format, dtype",
    [
        *(("baichuan", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        *(("llama", dtype) for dtype in (torch.float16, torch.bfloat16)),  # where the normalised head is rounded
    ],
)
def test_proof_passes_a_right_merge_and_stops_a_wrong_one(checkpoint, tmp_path, capsys, monkeypatch, dtype, format):
    base = make_base(checkpoint, tmp_path / "base", dtype)
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "right", "--format", format)
    capsys.readouterr()
    merge(base, adapter, tmp_path / "right", "--check_only")
    out = capsys.readouterr().out
    assert all(words in out for words in ("largest difference", "mean KL divergence", "equal argmax", str(dtype)))

    right = merge_params.merged_tensors

    def wrong(weights, updates, device):  # the last layer is forgotten
        return right(weights, {name: update for name, update in updates.items() if "layers.1." not in name}, device)

    monkeypatch.setattr(merge_params, "merged_tensors", wrong)
    (tmp_path / "results").mkdir()
    error = refusal(capsys, base, adapter, tmp_path / "results/wrong", "--format", format)
    assert any(repr(probe["prompt"]) in error for probe in merge_params.PROBES)


@pytest.mark.parametrize("exceeded", ["largest difference", "divergence"])
def test_either_bound_alone_stops_a_merge(checkpoint, adapter, merged, capsys, monkeypatch, exceeded):
    """One unlikely token far off, at one position, hides in the mean; a little everywhere hides in the largest."""
    most, most_divergence = merge_params.BOUNDS[torch.float32]
    expected = torch.randn(100, 2000, generator=torch.Generator().manual_seed(0)) * 3
    found = expected.clone()
    if exceeded == "divergence":
        found += 0.9 * most * 3 * torch.randn(expected.shape).sign()
    else:
        found[7, expected[7].argmin()] += 5 * most * 3
    result = compare([expected], [found])
    assert (result.largest > most * result.spread) == (exceeded == "largest difference")
    assert (result.divergence > most_divergence) == (exceeded == "divergence")
    monkeypatch.setattr(merge_params, "adapter_logits", lambda *_: ([expected], [expected]))
    monkeypatch.setattr(merge_params, "logits_of", lambda *_: [found])
    assert "does not compute what the adapter does" in refusal(capsys, checkpoint, adapter, merged, "--check_only")


def test_check_only_finds_a_weight_changed_by_a_hundredth(checkpoint, adapter, merged, tmp_path, capsys):
    copy = tmp_path / "merge"
    shutil.copytree(merged, copy)
    merge(checkpoint, adapter, copy, "--check_only")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(tensors, copy / "model.safetensors")
    assert "worst probe" in refusal(capsys, checkpoint, adapter, copy, "--check_only")


def test_a_conversation_is_one_probe(checkpoint, tmp_path):
    """Laid out whole: no eos between its turns, and a marker for each."""
    turns = ["你是谁？", "俺老孙！", "再说一遍。", "齐天大圣！"]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    path = tmp_path / "probes.json"
    path.write_text(json.dumps({"system": "甲", "messages": messages}), encoding="utf-8")
    base = ModelDirectory(checkpoint)
    (conversation,), (ids,) = merge_params.read_probes(SimpleNamespace(probe_path=path, probes=5), base)
    text = [base.tokenizer.text_to_ids(text) for text in ["甲", *turns]]
    assert ids == [*text[0], 195, *text[1], 196, *text[2], 195, *text[3], 196, *text[4]]
    assert conversation == [{"role": "system", "content": "甲"}, *messages]


def test_probes_of_the_users_own(checkpoint, adapter, merged, samples, tmp_path, capsys):
    merge(checkpoint, adapter, merged, "--check_only", "--probe_path", samples[1], "--probes", "5")
    assert "of 5 probes" in capsys.readouterr().out
    (tmp_path / "probes.json").write_text('{"system": ""}\n')
    error = refusal(capsys, checkpoint, adapter, tmp_path / "m", "--probe_path", tmp_path / "probes.json")
    assert "probes.json:1: " in error
    error = refusal(capsys, checkpoint, adapter, tmp_path / "m", "--probe_path", tmp_path / "none.json")
    assert "none.json: there is no such file" in error


def test_half_precision_is_compared_in_float32_and_left_as_it_was(checkpoint):
    from support.model.comparison import compute_in_float32, logits_of

    half = BaichuanForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    wide = BaichuanForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).float().eval()
    before = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    compute_in_float32(half)
    texts = [[5, 6, 7, 300, 301], [8, 9]]
    for found, text in zip(logits_of(half, texts), texts):  # padded in one batch, against each by itself
        with torch.no_grad():
            assert (found - wide(torch.tensor([text])).logits[0]).abs().max() < 1e-5
    assert all(torch.equal(before[name], tensor) for name, tensor in half.state_dict().items())


# ---------------------------------------------------------------- what goes wrong


def test_adapters_that_do_not_belong_to_the_base(checkpoint, adapter, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    target = tmp_path / "results/merged"

    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    factors = load_file(other / "adapter_model.safetensors")

    def with_factors(change) -> str:
        save_file({key: tensor for key, tensor in map(change, factors.items())}, other / "adapter_model.safetensors")
        return refusal(capsys, checkpoint, other, target)

    error = with_factors(lambda pair: (pair[0], pair[1].repeat(1, 2) if "W_pack.lora_A" in pair[0] else pair[1]))
    assert "W_pack.weight as a matrix of (192, 128), the base has (192, 64)" in error
    error = with_factors(lambda pair: (pair[0].replace("W_pack", "q_proj"), pair[1]))
    assert "changes model.layers.0.self_attn.q_proj.weight, which the base does not have" in error
    error = with_factors(lambda pair: (pair[0].replace("layers.1", "layers.7"), pair[1]))
    assert "layers.7" in error
    error = with_factors(lambda pair: (pair[0], pair[1] * 0 if "lora_B" in pair[0] else pair[1]))
    assert "the adapter is empty" in error
    error = with_factors(lambda pair: (pair[0], pair[1] / 0 if "lora_B" in pair[0] else pair[1]))
    assert "holds infinite numbers or NaN" in error and error.count("\n") == 5
    error = with_factors(lambda pair: (pair[0], pair[1][:2] if "lora_A" in pair[0] else pair[1]))
    assert "rank 4" in error
    error = with_factors(lambda pair: (pair[0].replace("o_proj.lora_A", "o_proj.lora_C"), pair[1]))
    assert "merge this adapter with PEFT" in error
    error = with_factors(lambda pair: (pair[0], torch.empty(0)))
    assert "is empty, as ZeRO-3 leaves it without gathering" in error
    save_file({}, other / "adapter_model.safetensors")
    assert "the adapter is empty" in refusal(capsys, checkpoint, other, target)
    (other / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "fetch it with git lfs pull" in refusal(capsys, checkpoint, other, target)
    (other / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in refusal(capsys, checkpoint, other, target)
    (other / "adapter_config.json").unlink()
    assert "adapter_config.json: is missing" in refusal(capsys, checkpoint, other, target)


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"peft_type": "LOHA"},
        {"fan_in_fan_out": True},
        {"a_later_invention": 3},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_change_more_than_the_weights_are_refused(checkpoint, adapter, tmp_path, capsys, setting):
    shutil.copytree(adapter, tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings | setting))
    name, value = next(iter(setting.items()))
    error = refusal(capsys, checkpoint, tmp_path / "adapter", tmp_path / "merged")
    assert f"adapter_config.json: {name} = {json.dumps(value)} is not supported here" in error


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemError('code of a pickle ran')",)


def test_bases_that_cannot_be_merged(checkpoint, adapter, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    (tmp_path / "results").mkdir()
    tensors = load_file(base / "model.safetensors")

    def error() -> str:
        return refusal(capsys, base, adapter, tmp_path / "results/merged")

    save_file(
        {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, base / "model.safetensors"
    )
    assert "the weights lack model.norm.weight" in error()
    save_file(tensors | {"model.extra": torch.ones(1)}, base / "model.safetensors")
    assert "the weights hold model.extra, which the model has not" in error()
    save_file(tensors | {"model.norm.weight": torch.ones(9)}, base / "model.safetensors")
    assert "model.norm.weight has shape (9,), config.json asks for (64,)" in error()
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)}, base / "model.safetensors")
    assert "lm_head.weight is torch.int8" in error()
    (base / "model.safetensors").write_bytes((Path(checkpoint) / "model.safetensors").read_bytes()[:-1000])
    assert "model.safetensors: is damaged or incomplete" in error()
    (base / "model.safetensors").unlink()
    assert "has no weights" in error()
    torch.save(tensors | {"model.norm.weight": Evil()}, base / "pytorch_model.bin")
    assert "may run code" in error()
    torch.save(
        tensors | {"model.norm.weight": Evil()}, base / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    assert "may run code" in error()
    torch.save(tensors | {"epoch": 3}, base / "pytorch_model.bin")
    assert "holds other things than named tensors" in error()
    (base / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "fetch it with git lfs pull" in error()
    (base / "pytorch_model.bin.index.json").write_text('{"weight_map": {"lm_head.weight": "pytorch_model-1.bin"}}')
    (base / "pytorch_model.bin").unlink()
    assert "pytorch_model-1.bin: is missing" in error()
    shutil.copy(Path(checkpoint) / "model.safetensors", base)
    settings = (base / "config.json").read_text()
    (base / "config.json").write_text('{"model_type": "llama"}')
    assert "is a model of the type llama" in error()
    (base / "config.json").write_text(settings)
    (base / "generation_config.json").unlink()
    assert "generation_config.json" in error()


def test_a_base_that_is_itself_merged(checkpoint, adapter, merged, tmp_path, capsys):
    assert "has this adapter merged into it already" in refusal(capsys, merged, adapter, tmp_path / "twice")
    other = make_adapter(checkpoint, tmp_path / "other", spread=0.2)
    error = refusal(capsys, merged, other, tmp_path / "both")
    assert "is itself merged" in error and checkpoint in error
    second = make_adapter(merged, tmp_path / "second", spread=0.2)  # trained on the merged model: this one belongs
    merge(merged, second, tmp_path / "stacked")


@pytest.fixture
def own_adapter(checkpoint, adapter, tmp_path) -> Path:
    """As train.py saves it: with the fingerprint of its base."""
    own = Path(shutil.copytree(adapter, tmp_path / "own"))
    write_training(own, ModelDirectory(checkpoint).fingerprint, False)
    return own


def test_an_adapter_goes_into_its_own_base_alone(checkpoint, own_adapter, merged, tmp_path, capsys):
    """By its weights, not by its name: other ones of the same shape are refused, by every script, whatever they are called."""
    torch.manual_seed(7)
    random = tmp_path / "elsewhere" / Path(checkpoint).name
    shutil.copytree(checkpoint, random)
    write_weights(random, BaichuanForCausalLM(ModelDirectory(checkpoint).config).state_dict().items())
    error = refusal(capsys, random, own_adapter, tmp_path / "merged")
    assert error == f"error: {own_adapter}: was trained on other weights than those of {random}: " + (
        f"name the base that it was trained on, called {checkpoint} then"
    )
    assert "trained on other weights" in refusal(capsys, random, own_adapter, merged, "--check_only")
    with pytest.raises(UserError, match="was trained on other weights"):
        Candidate("other", tmp_path / "answers", ModelDirectory(random), own_adapter).check(False)
    with pytest.raises(SystemExit):
        web_demo.main(
            ["--model_path", str(random), "--adapter_path", str(own_adapter), "--desc_path", PROFILES, "--ask", "谁？"]
        )
    assert "was trained on other weights" in capsys.readouterr().err

    second = make_adapter(merged, tmp_path / "second", spread=0.2)  # the second stage of a training, on what was merged
    write_training(second, ModelDirectory(merged).fingerprint, False)
    assert "was trained on other weights" in refusal(capsys, checkpoint, second, tmp_path / "first base")
    moved = Path(shutil.copytree(merged, tmp_path / "renamed"))
    merge(moved, second, tmp_path / "both stages")


def test_a_base_that_has_moved_and_is_stored_in_another_way_is_the_same(
    checkpoint, own_adapter, merged, tmp_path, capsys
):
    base, tensors = tmp_path / "moved", load_file(Path(checkpoint) / "model.safetensors")
    shutil.copytree(checkpoint, base)
    (base / "model.safetensors").unlink()
    write_weights(base, tensors.items(), shard_bytes=100_000)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    capsys.readouterr()
    merge(base, own_adapter, tmp_path / "merged")
    assert "warning" not in capsys.readouterr().err
    ours, theirs = (load_file(directory / "model.safetensors") for directory in (tmp_path / "merged", merged))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_adapter_of_another_program_is_merged_with_a_warning(checkpoint, adapter, tmp_path, capsys):
    base = shutil.copytree(checkpoint, tmp_path / "another name")
    capsys.readouterr()
    merge(base, adapter, tmp_path / "merged")
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert f"{adapter}: names {checkpoint} as its base" in warning
    merge(checkpoint, adapter, tmp_path / "merged", "--overwrite")
    assert "warning" not in capsys.readouterr().err


# ---------------------------------------------------------------- the layout that is written

FOREIGN = "{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfor %}"


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("format", ["baichuan", "llama"])
def test_a_foreign_chat_template_is_not_passed_on(checkpoint, adapter, tmp_path, format, place):
    base, ours = Path(shutil.copytree(checkpoint, tmp_path / "base")), BaichuanTokenizer.from_pretrained(checkpoint)
    if place == "chat_template.jinja":
        (base / place).write_text(FOREIGN)
    else:
        (base / "chat_template.jinja").unlink(missing_ok=True)
        settings = json.loads((base / place).read_text())
        (base / place).write_text(json.dumps(settings | {"chat_template": FOREIGN}))
    merge(base, adapter, tmp_path / "merged", "--format", format)
    assert "INST" not in "".join(path.read_text() for path in (tmp_path / "merged").glob("*.j*"))
    messages = [{"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "俺老孙！"}]
    if format == "llama":  # as an engine reads it, which knows nothing of this project
        rendered = AutoTokenizer.from_pretrained(tmp_path / "merged").apply_chat_template(messages)["input_ids"]
        assert rendered == messages_to_ids(ours, messages)


@pytest.mark.parametrize("format", ["baichuan", "llama"])
def test_the_proof_reads_the_template_that_is_written(checkpoint, adapter, tmp_path, capsys, format):
    target = tmp_path / "merged"
    merge(checkpoint, adapter, target, "--format", format)
    template = (target / "chat_template.jinja").read_text()
    for other, problem in (
        (FOREIGN, "its chat template does not lay a conversation out as it was trained"),
        (template.replace("message['content']", "message['content'] + '\\n'"), "does not lay a conversation out"),
        (None, "has no chat_template.jinja"),
    ):
        (target / "chat_template.jinja").write_text(other) if other else (target / "chat_template.jinja").unlink()
        assert problem in refusal(capsys, checkpoint, adapter, target, "--check_only", "--format", format)
    (target / "chat_template.jinja").write_text(template)
    (tmp_path / "probes.json").write_text(json.dumps({"prompt": "<reserved_107>我</s><unk>是谁？", "response": "答"}))
    merge(checkpoint, adapter, target, "--check_only", "--format", format, "--probe_path", tmp_path / "probes.json")


def test_directories_that_are_taken(checkpoint, adapter, merged, tmp_path, capsys, monkeypatch):
    target = tmp_path / "taken"
    shutil.copytree(merged, target)
    assert "replace it with --overwrite" in refusal(capsys, checkpoint, adapter, target)
    (target / "stale").touch()
    monkeypatch.setattr(merge_params, "prove", lambda *_: (_ for _ in ()).throw(merge_params.UserError("differs")))
    refusal(capsys, checkpoint, adapter, target, "--overwrite")  # which would show that the old result is gone
    monkeypatch.undo()
    merge(checkpoint, adapter, target, "--overwrite")
    assert not (target / "stale").exists()

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").touch()
    assert "no model" in refusal(capsys, checkpoint, adapter, tmp_path / "notes", "--overwrite")
    copy = tmp_path / "output/adapter"
    shutil.copytree(adapter, copy)
    assert "is read here" in refusal(capsys, checkpoint, copy, tmp_path / "output", "--overwrite")
    (tmp_path / "empty").mkdir()
    merge(checkpoint, adapter, tmp_path / "empty")


def test_all_problems_are_told_at_once(checkpoint, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    (base / "model.safetensors").unlink()
    error = refusal(capsys, base, tmp_path / "none", tmp_path / "base", "--device", "tpu")
    assert len(re.findall("^error: ", error, re.M)) == 4
    assert all(words in error for words in ("--device tpu", "has no weights", "adapter_config.json", "is read here"))


def test_devices(checkpoint, adapter, tmp_path, capsys):
    assert "use --device cpu" in refusal(capsys, checkpoint, adapter, tmp_path / "m", "--device", "0")
    assert {merge_params.pick_device(name) for name in ("cpu", "-1", "auto")} == {torch.device("cpu")}


@pytest.mark.parametrize("death", ["full disk", "kill"])
def test_full_disk_or_kill_leaves_nothing(checkpoint, adapter, tmp_path, death):
    """A limit on the size of files stands for the full disk; the kill comes when all is written but not proven."""
    script = {
        "full disk": "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))",
        "kill": "import os; merge_params.prove = lambda *_: os.kill(os.getpid(), 9)",
    }[death]
    flags = ["--ori_model_dir", checkpoint, "--model_dir", str(adapter), "--save_model_dir", str(tmp_path / "merged")]
    command = [sys.executable, "-c", f"import merge_params; {script}; merge_params.main({flags})"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not (tmp_path / "merged").exists()
    if death == "full disk":
        assert run.returncode == 2
        assert re.search(r"^error: .*cannot be written", run.stderr, re.M) and "Traceback" not in run.stderr
        assert list(tmp_path.iterdir()) == []
    else:
        assert run.returncode == -9
