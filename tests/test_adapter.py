"""An adapter is read, refused where it does not belong, and loaded onto its base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_adapter, merge, refusal
from safetensors.torch import load_file, save_file
from web_client import DESC_PATH

import predict
import web_demo
from baichuan import BaichuanForCausalLM
from support.errors import UserError
from support.model.adapter import load_adapter, read_adapter, write_training
from support.model.directory import ModelDirectory
from support.model.weights import write_weights
from support.scores.candidates import Candidate


def test_adapters_that_do_not_belong_to_the_base(checkpoint, adapter, tmp_path):
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    file = other / "adapter_model.safetensors"
    factors = load_file(file)

    def error() -> str:
        with pytest.raises(UserError) as refused:
            read_adapter(ModelDirectory(checkpoint), other)
        return str(refused.value)

    def error_of(change) -> str:
        save_file({key: tensor for key, tensor in map(change, factors.items())}, file)
        return error()

    wide = error_of(lambda pair: (pair[0], pair[1].repeat(1, 2) if "W_pack.lora_A" in pair[0] else pair[1]))
    assert "W_pack" in wide and "torch.Size([4, 128])" in wide
    foreign = error_of(lambda pair: (pair[0].replace("W_pack", "q_proj"), pair[1]))
    assert "its file and the base do not both have base_model.model.model.layers.0.self_attn.W_pack.lora_A" in foreign
    assert "layers.1" in error_of(lambda pair: (pair[0].replace("layers.1", "layers.7"), pair[1]))
    assert "o_proj.lora_A" in error_of(lambda pair: (pair[0].replace("o_proj.lora_A", "o_proj.lora_C"), pair[1]))
    assert "it changes nothing" in error_of(lambda pair: (pair[0], pair[1] * 0 if "lora_B" in pair[0] else pair[1]))
    assert "infinite numbers" in error_of(lambda pair: (pair[0], pair[1] / 0 if "lora_B" in pair[0] else pair[1]))
    assert "size mismatch" in error_of(lambda pair: (pair[0], pair[1][:2] if "lora_A" in pair[0] else pair[1]))
    assert "torch.Size([0])" in error_of(lambda pair: (pair[0], torch.empty(0)))  # as ZeRO-3 leaves it
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "fetch it with git lfs pull" in error()
    file.unlink()
    assert "holds no adapter_model.safetensors" in error()
    (other / "adapter_config.json").unlink()
    assert "adapter_config.json: is missing" in error()


def test_settings_that_change_more_than_the_weights_are_refused(checkpoint, adapter, tmp_path):
    other = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    settings, lists = json.loads((adapter / "adapter_config.json").read_text()), {"modules_to_save": ["lm_head"]}
    changes = {"use_dora": True, "bias": "all", "init_lora_weights": "pissa", "peft_type": "LOHA", "later": 3, **lists}
    for name, value in changes.items():
        (other / "adapter_config.json").write_text(json.dumps(settings | {name: value}))
        with pytest.raises(UserError) as refused:
            read_adapter(ModelDirectory(checkpoint), other)
        assert f"adapter_config.json: {name} = {json.dumps(value)} is not supported here" in str(refused.value)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]}]
)
def test_adapters_that_no_merge_can_hold_are_refused_by_every_script(
    checkpoint, tmp_path, capsys, monkeypatch, settings
):
    """Before a model is read."""
    adapter = make_adapter(checkpoint, tmp_path / "adapter", **settings)
    monkeypatch.setattr(ModelDirectory, "load", lambda *_, **__: pytest.fail("was read"))
    merging = refusal(capsys, checkpoint, adapter, tmp_path / "merged")
    flags = ["--model_path", checkpoint, "--adapter_path", adapter]
    (tmp_path / "test.json").write_text('{"prompt": "谁？", "response": "我"}', encoding="utf-8")
    for script, more in (
        (web_demo, ["--desc_path", DESC_PATH, "--ask", "谁？"]),
        (predict, ["--test_path", tmp_path / "test.json"]),
    ):
        with pytest.raises(SystemExit):
            script.main(list(map(str, [*flags, *more])))
        assert capsys.readouterr().err.strip().endswith(merging)
    assert "not supported here" in merging and merging.count("error: ") == 1


@pytest.fixture
def own_adapter(checkpoint, adapter, tmp_path) -> Path:
    """As train.py saves it: with the fingerprint of its base."""
    own = Path(shutil.copytree(adapter, tmp_path / "own"))
    write_training(own, ModelDirectory(checkpoint).fingerprint)
    return own


def test_an_adapter_goes_into_its_own_base_alone(checkpoint, own_adapter, merged, tmp_path, capsys):
    """By its weights, not by its name: other ones of the same shape are refused, by every script, whatever they are called."""
    torch.manual_seed(7)
    random = tmp_path / "elsewhere" / Path(checkpoint).name
    shutil.copytree(checkpoint, random)
    write_weights(random, BaichuanForCausalLM(ModelDirectory(checkpoint).config).state_dict())
    error = refusal(capsys, random, own_adapter, tmp_path / "merged")
    assert error == f"error: {own_adapter}: was trained on other weights than those of {random}: " + (
        f"name the base that it was trained on, called {checkpoint} then; saved anew in float16, or from it, it is another"
    )
    assert "trained on other weights" in refusal(capsys, random, own_adapter, merged, "--check_only")
    with pytest.raises(UserError, match="was trained on other weights"):
        Candidate("other", tmp_path / "answers", ModelDirectory(random), own_adapter).check(False)
    with pytest.raises(SystemExit):
        flags = ["--model_path", random, "--adapter_path", own_adapter, "--desc_path", DESC_PATH, "--ask", "谁？"]
        web_demo.main(list(map(str, flags)))
    assert "was trained on other weights" in capsys.readouterr().err

    second = make_adapter(merged, tmp_path / "second", spread=0.2)  # the second stage of a training, on what was merged
    write_training(second, ModelDirectory(merged).fingerprint)
    assert "was trained on other weights" in refusal(capsys, checkpoint, second, tmp_path / "first base")
    moved = Path(shutil.copytree(merged, tmp_path / "renamed"))
    merge(moved, second, tmp_path / "both stages")


def test_an_adapter_of_another_program_is_read_with_a_warning(checkpoint, adapter, merged, tmp_path, capsys):
    base = shutil.copytree(checkpoint, tmp_path / "another name")
    read_adapter(ModelDirectory(base), adapter)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert f"{adapter}: names {checkpoint} as its base" in warning
    read_adapter(ModelDirectory(checkpoint), adapter)
    assert "warning" not in capsys.readouterr().err
    error = refusal(capsys, merged, adapter, tmp_path / "twice")
    assert f"{merged}: is itself merged" in error and checkpoint in error


def test_an_adapter_goes_where_its_model_is(checkpoint, tmp_path, monkeypatch):
    """PEFT alone would take it to the first GPU, whichever was chosen."""
    asked = []
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: asked.append("cuda") or "cuda")
    model = load_adapter(ModelDirectory(checkpoint).load(), make_adapter(checkpoint, tmp_path / "adapter"))
    assert not asked and {parameter.device.type for parameter in model.parameters()} == {"cpu"}
