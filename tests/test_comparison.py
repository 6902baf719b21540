"""How far two models differ; whatever answers compares itself with whole passes first, and refuses to go wrong."""

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT

import predict
import train
import web_demo
from baichuan import BaichuanForCausalLM
from baichuan.modeling_baichuan import BaichuanModel
from merge_params import logits_of
from support.model.comparison import cache_error, compare_logits, compute_in_float32
from tests.forked import free_port

PROMPTS = [[5, 9, 77, 130], [11, 300, 8, 42, 600, 7, 19, 250]]


@pytest.fixture
def ignored_cache(monkeypatch):
    """The model of the day on which transformers renamed its argument: every new token sees only itself."""
    forward = BaichuanModel.forward

    def forgets(self, *args, cache=None, use_cache=None, **kwargs):
        kwargs["attention_mask"] = None
        return forward(self, *args, use_cache=False, **kwargs)

    monkeypatch.setattr(BaichuanModel, "forward", forgets)


def test_cache_error_is_rounding_alone(checkpoint):
    model = BaichuanForCausalLM.from_pretrained(checkpoint)
    assert cache_error(model, PROMPTS, 0) < 1e-5
    assert cache_error(model.bfloat16(), PROMPTS, 0) < 0.05


def test_cache_error_of_a_lost_cache(checkpoint, ignored_cache):
    assert cache_error(BaichuanForCausalLM.from_pretrained(checkpoint), PROMPTS, 0) > 0.5


@pytest.mark.parametrize("who", ["page", "predict", "train"])
def test_nothing_answers_with_an_ignored_cache(
    who, checkpoint, samples, train_arguments, tmp_path, ignored_cache, capsys
):
    profiles, answers = ROOT / "data/sample/profiles-zh_desc.json", tmp_path / "answers.jsonl"
    script, flags = {
        "page": (web_demo, ["--desc_path", profiles, "--model_path", checkpoint, "--port", free_port()]),
        "predict": (predict, ["--test_path", samples[1], "--model_path", checkpoint, "--output_path", answers]),
        "train": (train, train_arguments(tmp_path / "run")),
    }[who]
    with pytest.raises(SystemExit) as end:
        script.main(list(map(str, flags)))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and f"transformers {transformers.__version__}" in line and "constraints.txt" in line
    assert not answers.exists() and not list(tmp_path.glob("run/epoch*"))


def test_comparison_against_numpy():
    generator = np.random.default_rng(0)
    p, q = ([generator.normal(0, 2, (n, 50)) for n in (3, 5)] for _ in range(2))
    q[0][:] = p[0]
    result = compare_logits([torch.tensor(x) for x in p], [torch.tensor(x) for x in q])
    softmax = [[np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in side] for side in (p, q)]
    divergence = np.concatenate([(a * np.log(a / b)).sum(-1) for a, b in zip(*softmax)])
    assert result.largest == pytest.approx(np.abs(p[1] - q[1]).max())
    assert result.divergence == pytest.approx(divergence.mean())
    assert result.same_argmax == pytest.approx((3 + (p[1].argmax(-1) == q[1].argmax(-1)).sum()) / 8)
    assert result.worst == 1 and result.spread == pytest.approx(np.mean([x.var(ddof=1) for x in p]) ** 0.5)


def test_comparison_does_not_pass_over_nan():
    good, bad = torch.zeros(2, 4), torch.zeros(2, 4)
    bad[1, 2] = torch.nan
    assert compare_logits([good], [bad]).largest == torch.inf


def test_half_precision_is_compared_in_float32_and_left_as_it_was(checkpoint):
    half = BaichuanForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    wide = BaichuanForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).float().eval()
    before = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    compute_in_float32(half)
    texts = [[5, 6, 7, 300, 301], [8, 9]]
    for found, text in zip(logits_of(half, texts), texts):  # padded in one batch, against each by itself
        with torch.no_grad():
            assert (found - wide(torch.tensor([text])).logits[0]).abs().max() < 1e-5
    assert all(torch.equal(before[name], tensor) for name, tensor in half.state_dict().items())
