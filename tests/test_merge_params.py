"""merge_params.py: the merged model is the trained one, it says so only when it is, and a failure leaves nothing behind."""

import gc
import json
import shutil
import subprocess
import sys
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_adapter, merge, refusal
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import merge_params
from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from baichuan.generation_utils import messages_to_ids
from support.errors import UserError
from support.model.adapter import read_adapter
from support.model.comparison import compare_logits
from support.model.directory import ModelDirectory
from support.model.weights import Weights, write_weights


def make_base(checkpoint, directory: Path, dtype=torch.float32) -> Path:
    shutil.copytree(checkpoint, directory)
    BaichuanForCausalLM.from_pretrained(checkpoint, dtype=dtype).save_pretrained(directory)
    return directory


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


def test_settings_recovered_from_the_adapter_give_what_peft_merges(checkpoint, tmp_path):
    patterns = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.gate_proj": 40, "up_proj": 8}}
    few = {"target_modules": ["W_pack"], "layers_to_transform": [1], "init_lora_weights": "gaussian"}
    for settings in (patterns, {**few, "use_rslora": True}):
        adapter = make_adapter(checkpoint, tmp_path / "adapter", **settings)
        merge(checkpoint, adapter, tmp_path / "merged", "--overwrite")
        by_peft = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), adapter).merge_and_unload()
        for name, weight in load_file(tmp_path / "merged/model.safetensors").items():
            torch.testing.assert_close(weight, by_peft.state_dict()[name], atol=1e-6, rtol=1e-6)


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
typed = [{"role": "user", "content": "<reserved_107></s>"}]
assert set(tokenizer.apply_chat_template(typed, return_dict=False)) & {1, 2, 195, 196} == {195}
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
    with model.disable_adapter():
        assert (expected - logits(model, BaichuanTokenizer.from_pretrained(checkpoint))).abs().max() > 0.1


def test_result_is_complete(checkpoint, merged, tmp_path):
    """What the base has, the result has; what the user set in its JSON files is there. Others may read it as any new file."""
    (tmp_path / "touched").touch()
    directories = (Path(checkpoint), merged, tmp_path)
    assert len({path.stat().st_mode for directory in directories for path in directory.iterdir()}) == 1
    names = {path.name for path in Path(checkpoint).iterdir()}
    assert {path.name for path in merged.iterdir()} == names
    for name in ("generation_config.json", "tokenizer.model", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (Path(checkpoint) / name).read_bytes()
    before, after = (json.loads((Path(directory) / "config.json").read_text()) for directory in (checkpoint, merged))
    merge = after.pop("merged_adapter")
    assert after == before
    assert (merge["base"], merge["adapter"]) == ("Baichuan2-random", "epoch-1-step-3")


def test_large_results_are_sharded(checkpoint, adapter, merged, tmp_path, monkeypatch):
    monkeypatch.setattr(write_weights, "__defaults__", (200_000,))
    merge(checkpoint, adapter, tmp_path / "merged")
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 2
    assert index["metadata"]["total_size"] == Weights(merged).bytes
    found, expected = (BaichuanForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "merged", merged))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---------------------------------------------------------------- the proof


@pytest.mark.parametrize(
    "format, dtype",
    [("baichuan", torch.float32), ("baichuan", torch.float16), ("llama", torch.bfloat16)],  # whose head is rounded, too
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
    assert "results/wrong: is not this base with this adapter: model.layers.1." in error
    assert "has gained 0.000 of its update, where a right merge gains 1.000" in error
    if format == "baichuan":
        assert "has gained 0.000 of its update" in refusal(capsys, base, adapter, base, "--check_only")


@pytest.mark.parametrize("dtype, claims", [(torch.float32, 4), (torch.float16, 3), (torch.bfloat16, 2)])
def test_wrong_merges_are_refused_at_any_state_of_training(checkpoint, tmp_path, dtype, claims):
    """B grows from 0 while an adapter is trained. Where it is too small for its dtype, nothing is claimed."""
    base = ModelDirectory(make_base(checkpoint, tmp_path / "base", dtype))
    target = Path(shutil.copytree(base.path, tmp_path / "merged"))
    last, first = ("model.layers.1.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.weight")

    def refused(updates) -> str:
        tensors = dict(merge_params.merged_tensors(base.weights, updates, torch.device("cpu")))
        write_weights(target, {name: tensor.clone() for name, tensor in tensors.items()})
        try:
            arguments = SimpleNamespace(save_model_dir=target, model_dir=adapter)
            merge_params.prove_weights(arguments, base, ModelDirectory(target), torch.device("cpu"))
        except UserError as error:
            return str(error)
        return ""

    claimed = 0
    for spread in (3e-6, 3e-5, 3e-4, 0.03):
        adapter = make_adapter(base.path, tmp_path / f"adapter-{spread}", spread)
        updates = read_adapter(base, adapter)
        wrong = {
            "not merged": {},
            "a weight left out": {name: update for name, update in updates.items() if name != last},
            "two exchanged": updates | {first: updates[last], last: updates[first]},
        }
        for factor in (0.9, 1.1):
            scaled = {name: update._replace(scaling=factor * update.scaling) for name, update in updates.items()}
            wrong[f"scaled by {factor}"] = scaled
        if told := refused(updates):
            assert "nothing is proven" in told and "web_demo.py --adapter_path" in told
            assert refused({})  # and so it is with the base alone
        else:
            claimed += 1
            for name, updates in wrong.items():
                assert "is not this base with this adapter" in refused(updates), (spread, name)
    assert claimed == claims


@pytest.mark.parametrize(
    "dtype, most, most_divergence",
    [(torch.float32, 1e-4, 1e-8), (torch.float16, 0.06, 3e-4), (torch.bfloat16, 0.5, 2e-2)],
)
def test_either_bound_alone_stops_a_merge(monkeypatch, capsys, dtype, most, most_divergence):
    """One unlikely token far off, at one position, hides in the mean; a little everywhere hides in the largest."""
    expected = torch.randn(100, 2000, generator=torch.Generator().manual_seed(0)) * 3
    spread, signs = expected.std(), torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).sign()
    unlikely = torch.nn.functional.one_hot(expected.argmin(-1), 2000) * (torch.arange(100) == 7)[:, None]
    even = (2 * most_divergence) ** 0.5 * signs  # such noise diverges by half its square
    for difference, passes in (
        (0.9 * most * spread * unlikely, True),
        (1.2 * most * spread * unlikely, False),
        (0.9 * even, True),
        (1.2 * even, False),
    ):
        found = expected + difference
        one = compare_logits([expected], [found])
        assert passes or (one.largest > most * one.spread) != (one.divergence > most_divergence)
        merged = SimpleNamespace(weights=SimpleNamespace(dtype=dtype))
        monkeypatch.setattr(merge_params, "prove_layout", lambda *_: None)
        monkeypatch.setattr(merge_params, "prove_weights", lambda *_: None)
        monkeypatch.setattr(merge_params, "adapter_logits", lambda *_: ([expected], [-expected]))
        monkeypatch.setattr(merge_params, "load_in_float32", lambda *_: None)
        monkeypatch.setattr(merge_params, "logits_of", lambda *_, found=found: [found])
        probes = [([{"role": "user", "content": "谁？"}], [5])]
        with nullcontext() if passes else pytest.raises(UserError, match="does not compute what the adapter does"):
            merge_params.prove(
                SimpleNamespace(save_model_dir="m", model_dir="a"), None, merged, probes, torch.device("cpu")
            )
        told = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
        farthest = 2 * expected.abs().max()  # of the base alone, which is -expected
        assert told[0][2:] == [f"{number:.1e}" for number in (one.largest, most * spread, farthest)]
        assert told[1][4:6] == [f"{number:.1e}" for number in (one.divergence, most_divergence)]
        assert told[2][3:] == [f"{one.same_argmax:.2%}", "0.00%"] and one.same_argmax > 0.5


def test_logits_are_nearer_to_the_adapters_than_half_of_what_it_changes(monkeypatch, capsys):
    """In bfloat16 a small adapter changes less than rounding may."""
    expected = torch.randn(100, 2000, generator=torch.Generator().manual_seed(0))
    for name, result in {
        "prove_layout": None,
        "prove_weights": None,
        "load_in_float32": None,
        "adapter_logits": ([expected], [expected * 1.01]),
    }.items():
        monkeypatch.setattr(merge_params, name, lambda *_, result=result: result)
    merged = SimpleNamespace(weights=SimpleNamespace(dtype=torch.bfloat16))
    arguments = SimpleNamespace(save_model_dir="m", model_dir="a"), None, merged, [([], [5])], torch.device("cpu")
    monkeypatch.setattr(merge_params, "first_question", lambda messages: "谁？")
    for change, passes in ((1.004, True), (1.009, False), (1.01, False)):
        monkeypatch.setattr(merge_params, "logits_of", lambda *_, change=change: [expected * change])
        with nullcontext() if passes else pytest.raises(UserError, match="does not compute what the adapter does"):
            merge_params.prove(*arguments)
    base, told = compare_logits([expected], [expected * 1.01]), capsys.readouterr().out.splitlines()
    assert told[-3].split()[3:] == [f"{base.largest / 2:.1e}", f"{base.largest:.1e}"]
    assert told[-2].split()[5:] == [f"{base.divergence / 2:.1e}", f"{base.divergence:.1e}"]


@pytest.mark.parametrize(
    "name, told",
    [("layers.1.mlp.down_proj", "worst probe"), ("norm", "model.norm.weight has changed, and the adapter does not")],
)
def test_check_only_finds_a_weight_changed_by_a_hundredth(checkpoint, adapter, merged, tmp_path, capsys, name, told):
    copy = shutil.copytree(merged, tmp_path / "merge")
    merge(checkpoint, adapter, copy, "--check_only")
    tensors = load_file(copy / "model.safetensors")
    tensors[f"model.{name}.weight"] *= 1.01
    save_file(tensors, copy / "model.safetensors")
    assert told in refusal(capsys, checkpoint, adapter, copy, "--check_only")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_each_text_by_itself(checkpoint, tmp_path, monkeypatch, dtype):
    """Texts that begin alike stand in one row, base and adapter side by side: PEFT answers the same one by one."""
    monkeypatch.setattr(merge_params, "PROBES_A_PASS", 3)
    base = ModelDirectory(make_base(checkpoint, tmp_path / "base", dtype))
    adapter = make_adapter(base.path, tmp_path / "adapter")
    beginning = list(range(300, 380))
    texts = [beginning + [5, 6], beginning + [5, 7, 8], [9], beginning[:70], beginning + [5, 6]]
    found = merge_params.adapter_logits(base, adapter, texts, torch.device("cpu"))
    alone = BaichuanForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(alone, adapter).eval()
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_" in name:
                factor.copy_(factor.to(dtype))  # PEFT rounds them so beside a base in this dtype
        one_by_one = [model(torch.tensor([text])).logits[0, -merge_params.POSITIONS :] for text in texts]
        with model.disable_adapter():
            alone = [model(torch.tensor([text])).logits[0, -merge_params.POSITIONS :] for text in texts]
    for side, expected in zip(found, (one_by_one, alone)):
        assert [len(logits) for logits in side] == [64, 64, 1, 64, 64]
        assert max((a - b).abs().max() for a, b in zip(side, expected)) < 1e-5
    assert max((a - b).abs().max() for a, b in zip(*found)) > 0.1


def test_bars_reach_their_ends(checkpoint, adapter, tmp_path, monkeypatch, capsys):
    shown = partial(merge_params.tqdm, ncols=80, mininterval=0)

    def at_once(*args, delay, **options):
        assert delay > 0  # who waits for nothing sees nothing
        return shown(*args, **options)

    monkeypatch.setattr(merge_params, "tqdm", at_once)
    merge(checkpoint, adapter, tmp_path / "merged")
    told = capsys.readouterr().err
    merge(checkpoint, adapter, tmp_path / "merged", "--check_only")
    again = capsys.readouterr().err
    for name, count in (("merging", 17), ("comparing weights", 17), ("comparing logits", 2)):
        assert f"{name}: 100%" in told and f" {count}/{count} " in told
        assert (f"{name}: 100%" in again) == (name != "merging")


def test_a_conversation_is_one_probe(checkpoint, tmp_path):
    """Laid out whole: no eos between its turns, and a marker for each."""
    turns = ["你是谁？", "俺老孙！", "再说一遍。", "齐天大圣！"]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    path = tmp_path / "probes.json"
    path.write_text(json.dumps({"system": "甲", "messages": messages}), encoding="utf-8")
    base = ModelDirectory(checkpoint)
    ((conversation, ids),) = merge_params.read_probes(SimpleNamespace(probe_path=path, probes=5), base)
    text = [base.tokenizer.text_to_ids(text) for text in ["甲", *turns]]
    assert ids == [*text[0], 195, *text[1], 196, *text[2], 195, *text[3], 196, *text[4]]
    assert conversation == [{"role": "system", "content": "甲"}, *messages]


def test_probes_of_the_users_own(checkpoint, adapter, merged, samples, tmp_path, capsys):
    merge(checkpoint, adapter, merged, "--check_only", "--probe_path", samples[1], "--probes", "5")
    out = capsys.readouterr().out
    assert f"base     {checkpoint}: 17 tensors, 0.00145 GB, torch.float32\n" in out
    assert f"adapter  {adapter}: rank 4, changes 10 of the tensors\n" in out
    assert "10 weights have gained their updates, as PEFT computes them; rounding leaves 1.0000 of these\n" in out
    assert "logits at 320 positions of 5 probes" in out  # the last 64 of each
    (tmp_path / "probes.json").write_text('{"system": ""}\n')
    error = refusal(capsys, checkpoint, adapter, tmp_path / "m", "--probe_path", tmp_path / "probes.json")
    assert "probes.json:1: " in error


def test_merging_holds_one_model_at_a_time(checkpoint, tmp_path, monkeypatch):
    """A card of 24 GB has room for one: base and adapter are gone before the merged model is loaded."""
    loaded, load = [], merge_params.load_in_float32

    def watched(directory, device):
        assert not any(reference() is not None for model in loaded for reference in model)
        model = load(directory, device)
        loaded.append([weakref.ref(parameter) for parameter in model.parameters()])
        return model

    monkeypatch.setattr(merge_params, "load_in_float32", watched)
    adapter = make_adapter(checkpoint, tmp_path / "adapter")
    gc.disable()  # chance would have it that the first one is gone
    try:
        merge(checkpoint, adapter, tmp_path / "merged")
    finally:
        gc.enable()
    assert len(loaded) == 2


# ---------------------------------------------------------------- the layout that is written

FOREIGN = "{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfor %}"


@pytest.mark.parametrize("format, place", [("baichuan", "tokenizer_config.json"), ("llama", "chat_template.jinja")])
def test_what_the_base_files_hold(checkpoint, adapter, tmp_path, format, place):
    """A foreign chat template is not passed on; sampling settings that transformers refuses to save (#29988) are."""
    base, ours = Path(shutil.copytree(checkpoint, tmp_path / "base")), BaichuanTokenizer.from_pretrained(checkpoint)
    sampling = json.loads((base / "generation_config.json").read_text()) | {"do_sample": False, "temperature": 0.3}
    (base / "generation_config.json").write_text(json.dumps(sampling))
    (base / "chat_template.jinja").unlink()
    settings = {} if place == "chat_template.jinja" else json.loads((base / place).read_text())
    (base / place).write_text(json.dumps(settings | {"chat_template": FOREIGN}) if settings else FOREIGN)
    merge(base, adapter, tmp_path / "merged", "--format", format)
    assert json.loads((tmp_path / "merged/generation_config.json").read_text()) == sampling
    assert "INST" not in "".join(path.read_text() for path in (tmp_path / "merged").glob("*.j*"))
    messages = [{"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "俺老孙！"}]
    if format == "llama":  # as an engine reads it, which knows nothing of this project
        rendered = AutoTokenizer.from_pretrained(tmp_path / "merged").apply_chat_template(messages)["input_ids"]
        assert rendered == messages_to_ids(ours, messages)


@pytest.mark.parametrize("format", ["baichuan", "llama"])
def test_the_proof_reads_the_template_that_is_written(checkpoint, adapter, merged, tmp_path, capsys, format):
    target = tmp_path / "merged"
    if format == "llama":
        merge(checkpoint, adapter, target, "--format", format)
    else:
        shutil.copytree(merged, target)
    template = (target / "chat_template.jinja").read_text()
    for other in (FOREIGN, template.replace("message['content']", "message['content'] + '\\n'")):
        (target / "chat_template.jinja").write_text(other)
        error = refusal(capsys, checkpoint, adapter, target, "--check_only")
        assert "a conversation is not laid out as it was trained" in error
    (target / "chat_template.jinja").unlink()
    assert "chat_template.jinja" in refusal(capsys, checkpoint, adapter, target, "--check_only")
    (target / "chat_template.jinja").write_text(template)
    (tmp_path / "probes.json").write_text(json.dumps({"prompt": "<reserved_107>我</s><unk>是谁？", "response": "答"}))
    merge(checkpoint, adapter, target, "--check_only", "--probe_path", tmp_path / "probes.json")


# ---------------------------------------------------------------- what goes wrong


def test_directories_that_are_taken(checkpoint, adapter, merged, tmp_path, capsys, monkeypatch):
    target = shutil.copytree(merged, tmp_path / "taken")
    assert "exists already: name another directory, remove it, or add --overwrite" in refusal(
        capsys, checkpoint, adapter, target
    )
    (target / "stale").touch()
    monkeypatch.setattr(merge_params, "prove", lambda *_: (_ for _ in ()).throw(merge_params.UserError("differs")))
    refusal(capsys, checkpoint, adapter, target, "--overwrite")  # which would show that the old result is gone
    monkeypatch.undo()
    merge(checkpoint, adapter, target, "--overwrite")
    assert not (target / "stale").exists()

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").touch()
    for flags in ([], ["--overwrite"]):
        told = refusal(capsys, checkpoint, adapter, tmp_path / "notes", *flags)
        assert "exists already" in told and "or add" not in told
    assert "config.json: is missing" in refusal(capsys, checkpoint, adapter, tmp_path / "none", "--check_only")
    copy = shutil.copytree(adapter, tmp_path / "output/adapter")
    told = refusal(capsys, tmp_path / "nowhere", copy, tmp_path / "output", "--overwrite", "--device", "tpu").split(
        "\n"
    )
    assert [any(words in line for line in told) for words in ("is read here", "nowhere", "tpu")] == [True] * len(told)
    (tmp_path / "empty").mkdir()
    merge(checkpoint, adapter, tmp_path / "empty")
