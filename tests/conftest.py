"""Fixtures: a small random checkpoint under a real SentencePiece tokenizer, and the real RoleBench files where they are at hand."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test but that of --download, which sets its own hub, may look for a network

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # RoleBench and the published tokenizer, beside the checkout of those who have them


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    """A directory in the published layout: random weights (hidden 64, 2 layers), tokenizer trained on the sample."""
    from baichuan import tiny

    directory = tmp_path_factory.mktemp("checkpoint") / "Baichuan2-random"
    sizes = ["--hidden_size", "64", "--num_hidden_layers", "2", "--vocab_size", "2000", "--steps", "0"]
    tiny.main(["--save_dir", str(directory), "--data_dir", str(ROOT / "data/sample"), *sizes])
    return str(directory)
