"""The models that predict.py compares: loaded once, and each answers as itself."""

import torch
from conftest import make_adapter

from baichuan import BaichuanTokenizer
from support.model.directory import ModelDirectory
from support.scores.candidates import Candidate, Loader


def test_a_loader_keeps_what_is_asked_for_again(checkpoint, tmp_path):
    tokenizer = BaichuanTokenizer.from_pretrained(checkpoint)
    adapters = [make_adapter(checkpoint, tmp_path / name, spread) for name, spread in (("one", 0.1), ("two", 0.3))]
    base, one, two = (
        Candidate(str(adapter), tmp_path, ModelDirectory(checkpoint), adapter) for adapter in (None, *adapters)
    )
    loader, ids = Loader(torch.device("cpu")), torch.tensor([tokenizer.text_to_ids("你是谁？")])

    def logits(candidate):
        with torch.no_grad():
            return loader(candidate)(ids).logits

    expected = [logits(candidate) for candidate in (base, one, two)]
    assert loader(two) is loader(two._replace(output=tmp_path / "other"))
    for number in (2, 1, 0, 2, 0, 1, 1):
        assert torch.equal(logits((base, one, two)[number]), expected[number])
    assert not torch.allclose(expected[0], expected[1]) and not torch.allclose(expected[1], expected[2])
