"""What people take for a Baichuan2: other models of its type, settings of other programs, files that are not what they should be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PUBLISHED, ImpatientTimer
from safetensors.torch import load_file

from support.errors import UserError
from support.model.answering import greedy
from support.model.directory import ModelDirectory
from support.model.weights import write_weights


@pytest.fixture
def directory(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def settings_of(directory: Path, name: str, **changes) -> dict:
    """Change a JSON file; a change to None removes the field. Returns what it holds then."""
    settings = json.loads((directory / name).read_text()) | changes
    settings = {field: value for field, value in settings.items() if value is not None}
    (directory / name).write_text(json.dumps(settings))
    return settings


# ---------------------------------------------------------------- another model of the same model_type

SIZES_OF_13B = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13696}
OTHERS = {  # what config.json says → what the model is called
    "13B": ({**SIZES_OF_13B, "max_position_embeddings": None}, "is Baichuan 13B, whose attention has ALiBi"),
    "13B, saved anew": (SIZES_OF_13B, "is Baichuan 13B"),
    "without rotary positions": ({"max_position_embeddings": None}, "is Baichuan 13B"),
    "Baichuan 1": ({"vocab_size": 64_000}, "is Baichuan 1, which has another tokenizer and another head"),
    "Baichuan 1 by name": ({"architectures": ["BaiChuanForCausalLM"]}, "is Baichuan 1"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised"),
    "longer positions": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "has other rotary positions"),
    "another base": ({"rope_theta": 500_000}, "has other rotary positions"),
    "another base, as transformers 5 writes it": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
        "has other rotary positions",
    ),
    "M1": ({"model_type": "baichuan_m1"}, "is a model of the type baichuan_m1"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_model_of_the_type_is_refused_by_name(directory, other):
    """Its tensors may fit: here they are all as they should be."""
    changes, name = OTHERS[other]
    settings_of(directory, "config.json", **changes)
    for opened in (ModelDirectory(directory).check, lambda: ModelDirectory(directory).tokenizer):
        with pytest.raises(UserError) as refused:
            opened()
        (problem,) = refused.value.problems
        assert problem.startswith(f"{directory}: {name}") and "Baichuan2" in problem


def test_a_tokenizer_that_adds_a_space_is_refused(directory):
    from sentencepiece import sentencepiece_model_pb2

    path = directory / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = True
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="changes the text before it cuts it, as Baichuan 1's does"):
        ModelDirectory(directory).check()


def test_rotary_positions_that_are_spelled_out_are_taken(directory):
    for rope in ({"rope_scaling": {}}, {"rope_scaling": {"rope_type": "default"}, "rope_theta": 10_000}):
        settings_of(directory, "config.json", **rope)
        ModelDirectory(directory).check()


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="no published model beside the checkout")
def test_the_published_settings_are_taken():
    config = ModelDirectory(PUBLISHED).config
    assert (config.hidden_size, config.max_position_embeddings, config.z_loss_weight) == (4096, 4096, 0)


# ---------------------------------------------------------------- right, though unusual


def test_integers_are_numbers_and_a_byte_order_mark_is_none(directory):
    """Who has the base model writes generation_config.json himself; the tokenizer takes the markers from there."""
    settings_of(directory, "config.json", z_loss_weight=0, initializer_range=1, rms_norm_eps=1, rope_theta=10_000)
    settings_of(directory, "generation_config.json", temperature=1, top_p=1, repetition_penalty=1)
    settings_of(directory, "tokenizer_config.json", user_token_id=None, assistant_token_id=None)
    path = directory / "generation_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    opened = ModelDirectory(directory).check()
    assert (opened.config.z_loss_weight, opened.config.rms_norm_eps) == (0, 1)
    model = opened.load()
    opened.refuse_to_fail_later(model)
    assert model.generation_config.user_token_id == opened.tokenizer.user_token_id == 195
    path = directory / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(UserError, match="config.json: begins with a byte-order mark: save it as UTF-8 without one"):
        ModelDirectory(directory).check()


def refusals(directory: Path) -> list[str]:
    with pytest.raises(UserError) as refused:
        ModelDirectory(directory).check()
    return refused.value.problems


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": "0.3"}, {"temperature": -1}, {"top_p": "0.85"}, {"top_k": -1}, {"repetition_penalty": 0}),
        *({"stop_strings": ["。"]}, {"num_return_sequences": 2}, {"num_beams": 4}, {"cache_implementation": "static"}),
        *(
            {"return_dict_in_generate": True},
            {"max_new_tokens": "256"},
            {"min_new_tokens": "5"},
            {"token_healing": True},
        ),
        *({"penalty_alpha": 0.6, "do_sample": False}, {"prompt_lookup_num_tokens": 3}, {"bad_words_ids": [5]}),
    ],
    ids=str,
)
def test_settings_that_no_answer_can_be_generated_with(directory, wrong):
    settings_of(directory, "generation_config.json", **wrong)
    name, value = next(iter(wrong.items()))
    (problem,) = refusals(directory)
    told = f"{directory}/generation_config.json: {name} = {json.dumps(value, ensure_ascii=False)} cannot be used here: "
    assert problem.startswith(told) and "\n" not in problem


def test_settings_are_told_together_and_leave_random_numbers_alone(directory, capfd):
    settings_of(directory, "generation_config.json", top_k="5", num_beams=2)
    assert [problem.split(": ")[1].split(" = ")[0] for problem in refusals(directory)] == ["top_k", "num_beams"]
    settings_of(directory, "generation_config.json", top_k=5, num_beams=1)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ModelDirectory(directory).check()
    assert torch.rand(1) == expected
    settings_of(directory, "generation_config.json", do_sample=False, max_new_tokens=None)
    ModelDirectory(directory).check()
    assert capfd.readouterr() == ("", "")  # transformers has something to say of each of these


def test_a_temperature_of_zero_is_greedy(directory):
    """Whoever draws all the same, as predict.py --sample does, gets the most likely tokens, too."""
    settings_of(directory, "generation_config.json", temperature=0, do_sample=True)
    opened = ModelDirectory(directory)
    model, prompts = opened.load(), torch.tensor([[5, 9, 300]])
    config = opened.generation_config
    assert not config.do_sample
    expected = model.generate(prompts, generation_config=greedy(config, 8))
    for sampled in (False, True):
        config.update(do_sample=sampled, max_new_tokens=8, repetition_penalty=1.0)
        assert torch.equal(model.generate(prompts, generation_config=config), expected)


@pytest.mark.parametrize(
    "file, changes",
    [
        *(("generation_config.json", {"eos_token_id": id}) for id in (None, [], 195, [195, 196], 7)),
        *(("tokenizer_config.json", {"eos_token": token}) for token in ("<s>", "<reserved_106>", "。", "")),
    ],
    ids=str,
)
def test_an_end_token_that_is_none(directory, file, changes):
    """Training learns the tokenizer's end of an answer, and generation stops at that of generation_config.json."""
    settings_of(directory, file, **changes)
    (problem,) = refusals(directory)
    assert "answers end at another token" in problem and "take both files of Baichuan2-7B-Chat" in problem
    assert str(directory) in problem


def test_an_end_token_among_several_will_do(directory):
    settings_of(directory, "generation_config.json", eos_token_id=[7, 2])
    ModelDirectory(directory).check()


# ---------------------------------------------------------------- memory


def test_weights_that_do_not_fit_into_memory_are_not_read(directory, monkeypatch, capsys):
    """Those that keep their dtype are the mapped files on a CPU, and take none; see the kernel's own count."""
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    opened, cpu, gpu = ModelDirectory(directory), torch.device("cpu"), torch.device("cuda")
    numbers = sum(tensor.numel() for tensor in opened.weights.tensors.values())
    linear = sum(t.numel() for name, t in opened.weights.tensors.items() if "proj" in name or "W_pack" in name)
    assert opened.weights.memory(torch.float32, cpu) == 0
    assert opened.weights.memory(torch.bfloat16, cpu) == 2 * numbers
    assert opened.weights.memory(torch.float32, gpu) == 4 * numbers
    four_bit = opened.weights.memory(torch.bfloat16, gpu, four_bit=True)
    assert four_bit == pytest.approx(2 * (numbers - linear) + 0.516 * linear, rel=1e-3)

    monkeypatch.setattr("support.model.directory.free_memory", lambda device: 2 * numbers)
    opened.load(torch.bfloat16), opened.load()
    needed, free = f"{4 * numbers / 1e9:.3g} GB", f"{2 * numbers / 1e9:.3g} GB"
    told = f"{directory}: its weights take {needed} as torch.float32, and cuda has {free} free"
    with pytest.raises(UserError, match=told):
        opened.load(device=gpu)
    monkeypatch.setenv("LOCAL_SIZE", "2")  # two processes of the launcher on this host
    monkeypatch.setattr(opened, "_load", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(UserError, match="take a device with more memory, or add --load_in_4bit"):
        opened.load(torch.bfloat16)
    with pytest.raises(pytest.fail.Exception, match="was read"):  # each has a GPU of its own
        opened.load(torch.bfloat16, device=gpu)


def test_what_takes_long_is_told_beforehand(directory, monkeypatch, capsys):
    opened = ModelDirectory(directory)
    opened.refuse_to_fail_later(opened.load())
    assert capsys.readouterr().err == ""  # of a small model, nothing
    monkeypatch.setattr("support.command_line.Timer", ImpatientTimer)
    opened.refuse_to_fail_later(opened.load(torch.float32))
    assert capsys.readouterr().err == (
        f"reading {directory}, 0.00145 GB …\n"
        f"comparing answers of {directory} with and without the cache of keys and values …\n"
    )


# ---------------------------------------------------------------- the fingerprint


def test_the_fingerprint_is_of_the_arithmetic(checkpoint, directory):
    def fingerprint() -> str:
        return ModelDirectory(directory).fingerprint

    first, tensors = ModelDirectory(checkpoint).fingerprint, load_file(Path(checkpoint) / "model.safetensors")
    assert fingerprint() == first
    directory = directory.rename(directory.with_name("renamed"))
    settings_of(directory, "config.json", transformers_version="4.29.2", use_cache=False, architectures=["X"])
    settings_of(directory, "tokenizer_config.json", chat_template="{{ messages }}")
    assert fingerprint() == first
    (directory / "model.safetensors").unlink()
    write_weights(directory, tensors, shard_bytes=100_000)
    assert len(list(directory.glob("model-*.safetensors"))) > 3 and fingerprint() == first
    (directory / "model.safetensors.index.json").unlink()
    torch.save(dict(reversed(tensors.items())), directory / "pytorch_model.bin")
    assert fingerprint() == first
    torch.save({name: tensor.bfloat16() for name, tensor in tensors.items()}, directory / "pytorch_model.bin")
    assert fingerprint() == first

    other = {name: tensor + 1e-3 * (name == "model.layers.1.mlp.down_proj.weight") for name, tensor in tensors.items()}
    torch.save(other, directory / "pytorch_model.bin")
    assert fingerprint() != first
    torch.save(tensors, directory / "pytorch_model.bin")
    found = [fingerprint()]
    for change in ({"rms_norm_eps": 1e-5}, {"hidden_act": "gelu"}, {"num_attention_heads": 4}):
        settings_of(directory, "config.json", **change)
        found.append(fingerprint())
    assert found[0] == first and len(set(found)) == 4


# ---------------------------------------------------------------- files that are not what they should be


def test_a_missing_generation_config_says_where_to_get_it(directory):
    """Baichuan2-7B-Base comes without turn markers."""
    settings_of(directory, "generation_config.json", user_token_id=None)
    with pytest.raises(UserError, match="user_token_id is not known: take generation_config.json of Baichuan2-7B-Chat"):
        ModelDirectory(directory).check()
    (directory / "generation_config.json").unlink()
    with pytest.raises(UserError, match="take generation_config.json of Baichuan2-7B-Chat"):
        ModelDirectory(directory).check()


def test_a_pointer_of_git_lfs(directory):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:79452955\nsize 2001107\n"
    for name in ("tokenizer.model", "model.safetensors", "config.json", "generation_config.json"):
        content = (directory / name).read_bytes()
        (directory / name).write_text(pointer)
        with pytest.raises(UserError, match=rf"{name}: is a Git-LFS pointer, not the file itself: .* git lfs pull"):
            ModelDirectory(directory).check()
        (directory / name).write_bytes(content)
