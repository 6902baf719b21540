"""The sizes of a model, and the releases of transformers that it was tested under."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, SIZES
from huggingface_hub.errors import StrictDataclassError

from baichuan import BaichuanConfig
from baichuan.configuration_baichuan import TESTED, refuse_untested_transformers


def test_config_defaults_are_those_of_7b_and_unknown_fields_survive(tmp_path):
    config = BaichuanConfig.from_dict({"model_type": "baichuan", "something_new": [1, 2]})
    expected = {"vocab_size": 125_696, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}
    expected |= {"num_attention_heads": 32, "model_max_length": 4096, "rms_norm_eps": 1e-6, "z_loss_weight": 0}
    expected |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    assert {name: getattr(config, name) for name in expected} == expected
    config.save_pretrained(tmp_path)
    assert BaichuanConfig.from_pretrained(tmp_path).something_new == [1, 2]


@pytest.mark.parametrize("wrong", [{"hidden_size": 65}, {"num_hidden_layers": 0}, {"hidden_size": 12}])
def test_config_rejects_impossible_sizes(wrong):
    with pytest.raises(StrictDataclassError):
        BaichuanConfig(**SIZES | wrong)


@pytest.mark.parametrize("version", ["4.57.6", "5.2.0", "5.23.0", "5.25.0.dev0", "5.240.0", "6.0.0"])
def test_an_untested_transformers_is_refused_with_the_remedy(version, monkeypatch):
    monkeypatch.delenv("BAICHUAN_ANY_TRANSFORMERS", raising=False)
    with pytest.raises(ImportError, match=f"transformers {version} .*pip install"):
        refuse_untested_transformers(version)
    monkeypatch.setenv("BAICHUAN_ANY_TRANSFORMERS", "1")
    refuse_untested_transformers(version)


def test_a_saved_directory_refuses_an_untested_transformers(checkpoint, tmp_path):
    """Its copy of the code does, where this project is not, and in the last line of the error."""
    script = """
import sys, transformers
transformers.__version__ = "5.23.0"
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", script, checkpoint]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("ImportError: transformers 5.23.0 is installed") and "pip install" in line


def test_the_range_is_that_of_the_requirements():
    numbers = [tuple(map(int, minor.split("."))) for minor in TESTED]
    beyond = f"{numbers[-1][0]}.{numbers[-1][1] + 1}"
    assert f"transformers>={TESTED[0]},<{beyond}\n" in (ROOT / "requirements.txt").read_text()
    (pinned,) = re.findall(r"^transformers==(\d+\.\d+)\.", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert numbers == sorted(numbers) and pinned in TESTED
