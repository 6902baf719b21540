"""Whatever answers compares itself with whole passes first, and refuses a model or a library that goes wrong."""

import inspect

import pytest
import torch
import transformers
from conftest import ROOT, free_port

import predict
import train
import web_demo
from baichuan import BaichuanForCausalLM
from baichuan.configuration_baichuan import TESTED, refuse_untested_transformers
from baichuan.modeling_baichuan import BaichuanModel
from support.model.comparison import cache_error

PROMPTS = [[5, 9, 77, 130], [11, 300, 8, 42, 600, 7, 19, 250]]


@pytest.fixture
def ignored_cache(monkeypatch):
    """The model of the day on which transformers renamed its argument: every new token sees only itself."""
    forward = BaichuanModel.forward

    def forgets(self, *args, cache=None, past_key_values=None, use_cache=None, **kwargs):
        kwargs["attention_mask"] = None
        return forward(self, *args, use_cache=False, **kwargs)

    monkeypatch.setattr(BaichuanModel, "forward", forgets)


def test_cache_error_is_rounding_alone(checkpoint):
    model = BaichuanForCausalLM.from_pretrained(checkpoint)
    assert cache_error(model, PROMPTS, 0) < 1e-5
    assert cache_error(model.bfloat16(), PROMPTS, 0) < 0.05


def test_cache_error_of_a_lost_cache(checkpoint, ignored_cache):
    assert cache_error(BaichuanForCausalLM.from_pretrained(checkpoint), PROMPTS, 0) > 0.5


def profiles() -> list[str]:
    return ["--desc_path", str(ROOT / "data/sample/profiles-zh_desc.json")]


def refused(capsys, main, arguments) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("who", ["page", "ask", "predict", "train"])
def test_nothing_answers_with_an_ignored_cache(
    who, checkpoint, samples, train_arguments, tmp_path, ignored_cache, capsys
):
    main, arguments = {
        "page": (web_demo.main, ["--model_path", checkpoint, "--device", "cpu", "--port", free_port(), *profiles()]),
        "ask": (web_demo.main, ["--model_path", checkpoint, "--device", "cpu", "--ask", "你是谁？", *profiles()]),
        "predict": (
            predict.main,
            ["--model_path", checkpoint, "--test_path", samples[1], "--output_path", tmp_path / "answers.jsonl"],
        ),
        "train": (train.main, train_arguments(tmp_path / "run")),
    }[who]
    line = refused(capsys, main, arguments)
    assert f"transformers {transformers.__version__}" in line and "constraints.txt" in line
    assert not (tmp_path / "answers.jsonl").exists() and not list(tmp_path.glob("run/epoch*"))


def test_an_unknown_argument_is_refused_by_name(checkpoint):
    model, ids = BaichuanForCausalLM.from_pretrained(checkpoint), torch.tensor([PROMPTS[0]])
    with pytest.raises(TypeError, match="kv_store"):
        model(ids, kv_store=None)
    with pytest.raises(TypeError, match="kv_store"):
        model.generate(ids, max_new_tokens=2, kv_store=None)


def test_libraries_call_from_pretrained_by_its_parameter(checkpoint):
    ours, theirs = (
        list(inspect.signature(kind.from_pretrained).parameters)[0]
        for kind in (BaichuanForCausalLM, transformers.PreTrainedModel)
    )
    assert ours == theirs
    assert BaichuanForCausalLM.from_pretrained(pretrained_model_name_or_path=checkpoint)


@pytest.mark.parametrize("version", ["4.57.6", "5.9.0", "5.25.0.dev0", "6.0.0"])
def test_an_untested_transformers_is_refused_with_the_remedy(version, monkeypatch):
    monkeypatch.delenv("BAICHUAN_ANY_TRANSFORMERS", raising=False)
    with pytest.raises(ImportError, match=f"transformers {version} .*pip install"):
        refuse_untested_transformers(version)
    monkeypatch.setenv("BAICHUAN_ANY_TRANSFORMERS", "1")
    refuse_untested_transformers(version)


def test_the_range_is_that_of_the_requirements():
    lowest, highest = (tuple(map(int, version.split("."))) for version in TESTED)
    beyond = f"{highest[0]}.{highest[1] + 1}"
    assert f"transformers>={TESTED[0]},<{beyond}\n" in (ROOT / "requirements.txt").read_text()
    (pinned,) = [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("transformers==")
    ]
    assert lowest <= tuple(map(int, pinned.split("==")[1].split(".")[:2])) <= highest
