"""Likelihoods are those of answers read one by one, however they are computed; and plain text."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CONVERSATIONS, ROLE_SAMPLES, make_adapter, merge, one_by_one
from peft import PeftModel

from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from support.model.directory import ModelDirectory
from support.scores.likelihood import Likelihood, plain_text_scores, read_plain_text
from support.scores.table import compare


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return BaichuanTokenizer.from_pretrained(checkpoint)


@pytest.mark.parametrize("packing", ["tree", "none"])
def test_likelihoods_are_those_of_answers_read_one_by_one(model, tokenizer, packing):
    samples = [*ROLE_SAMPLES, *CONVERSATIONS, *ROLE_SAMPLES[:2]]
    found = Likelihood(model, tokenizer, packing=packing)(samples)
    assert len(found) == len(samples)
    for sample, losses in zip(samples, found):
        assert losses == pytest.approx(one_by_one(model, tokenizer, sample), abs=1e-4)


def test_small_chunks_of_logits_and_adapters_beside_the_weights_change_nothing(
    checkpoint, model, tokenizer, tmp_path, monkeypatch
):
    adapter = make_adapter(checkpoint, tmp_path / "adapter")
    wrapped = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), adapter).eval()
    merged = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), adapter).merge_and_unload()
    expected = np.concatenate(Likelihood(merged.eval(), tokenizer)(ROLE_SAMPLES))
    monkeypatch.setattr("support.scores.likelihood.LOGITS", 3 * model.config.vocab_size)
    assert np.concatenate(Likelihood(wrapped, tokenizer)(ROLE_SAMPLES)) == pytest.approx(expected, abs=1e-4)
    with wrapped.disable_adapter():
        base = np.concatenate(Likelihood(wrapped, tokenizer)(ROLE_SAMPLES))
    assert base == pytest.approx(np.concatenate(Likelihood(model, tokenizer)(ROLE_SAMPLES)), abs=1e-4)
    assert abs(base - expected).max() > 0.1


def test_the_llama_export_finds_the_same(checkpoint, tokenizer, tmp_path):
    adapter = make_adapter(checkpoint, tmp_path / "adapter")
    found = {}
    for kind in ("baichuan", "llama"):
        target = merge(checkpoint, adapter, tmp_path / kind, "--format", kind, "--probes", "1")
        found[kind] = Likelihood(ModelDirectory(target).load_mapped(), tokenizer)([*ROLE_SAMPLES, *CONVERSATIONS])
    assert np.concatenate(found["llama"]) == pytest.approx(np.concatenate(found["baichuan"]), abs=1e-4)


def test_processes_share_the_rows(model, tokenizer, monkeypatch):
    """Each of two reads half of the rows; the sum over both, which `all_reduce` makes, is what one process finds."""
    read, parts = [], []
    row = Likelihood._row
    monkeypatch.setattr(Likelihood, "_row", lambda self, batch: read.append(batch) or row(self, batch))
    alone = np.concatenate(Likelihood(model, tokenizer, max_pack_len=24)(ROLE_SAMPLES))
    rows = len(read)
    for rank in range(2):
        group = {"get_rank": lambda rank=rank: rank, "get_world_size": lambda: 2, "all_reduce": lambda found: None}
        monkeypatch.setattr("support.scores.likelihood.dist", SimpleNamespace(**group))
        parts.append(np.concatenate(Likelihood(model, tokenizer, max_pack_len=24, shared=True)(ROLE_SAMPLES)))
    assert rows >= 2 and len(read) == 2 * rows  # each row once
    assert np.array_equal(parts[0] + parts[1], alone)
    assert all((part == 0).any() for part in parts)


def test_plain_text_is_read_paragraph_by_paragraph(model, tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("俺老孙在此，且饮一杯。\n\n  俺老孙在此，哪里去。  \n。\n", encoding="utf-8")
    texts = read_plain_text(path)
    assert texts == ["俺老孙在此，且饮一杯。", "俺老孙在此，哪里去。", "。"]
    losses = Likelihood(model, tokenizer).of_texts(texts)
    for text, own in zip(texts, losses, strict=True):
        ids = tokenizer.text_to_ids(text)
        assert len(own) == len(ids) - 1
        if len(own):
            with torch.no_grad():
                loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
            assert own.sum() == pytest.approx(-loss.item() * len(own), abs=1e-4)
    score = plain_text_scores(Likelihood(model, tokenizer, max_len=4), texts)["perplexity"]
    assert score.weight.tolist() == [3, 3]  # the paragraph of one token predicts nothing


def test_by_hand_perplexity():
    base = [np.full(3, -np.log(8) / 3), np.full(1, -np.log(2)), np.empty(0)]
    tuned = [own - np.log(2) for own in base]
    models = [plain_text_scores(SimpleNamespace(of_texts=lambda texts, own=own: own), []) for own in (base, tuned)]
    (row,) = compare(dict(enumerate(models)), 50, 1)
    assert row.models == [pytest.approx((2, 2, 2)), pytest.approx((4, 4, 4))]
    assert row.differences == [pytest.approx((2, 2, 2))]
