"""What a run's directory holds to repeat it, and --config, which reads it."""

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, adapter_weights

import train
from support.training import run_record


@pytest.fixture(scope="module")
def recorded(train_arguments, tmp_path_factory):
    """A run of an epoch, started and then resumed with other flags."""
    output = tmp_path_factory.mktemp("recorded") / "run"
    arguments = train_arguments(output, "--sample_answers", 0, "--gradient_checkpointing", "--weight_decay", 0.5)
    train.main(arguments)
    train.main([*arguments, "--resume", "--show_loss_step", "2"])
    return output


def test_a_run_is_repeated_from_its_directory(recorded, tmp_path, capsys):
    """Nothing but the file of flags and another directory; what the line says wins."""
    config = str(recorded / "train_args.json")
    args = train.parse_args(["--config", config, "--lora_dim", "8", "--no-gradient_checkpointing"])
    assert (args.lora_dim, args.gradient_checkpointing, args.weight_decay) == (8, False, 0.5)
    assert args.show_loss_step == 2 and not args.resume and args.save_total_limit is None
    train.main(["--config", config, "--output_dir", str(tmp_path / "again")])
    ours, theirs = (adapter_weights(output / "epoch-1-step-5") for output in (tmp_path / "again", recorded))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    names = ("train_args.json", "run_record.json")
    ours, theirs = (
        [json.loads((output / name).read_text()) for name in names] for output in (tmp_path / "again", recorded)
    )
    assert ours[0] | {"output_dir": ""} == theirs[0] | {"output_dir": ""}
    when = {"started": "", "commit": ""}  # someone may commit meanwhile
    assert ours[1][0] | when == theirs[1][0] | when


def test_what_pip_has_left_of_a_package_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "broken-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    args = SimpleNamespace(output_dir=str(tmp_path), train_path=__file__, test_path=__file__, ds_file=__file__)
    run_record.keep_record(args, {}, {}, torch.device("cpu"))
    (start,) = json.loads((tmp_path / "run_record.json").read_text())
    assert start["packages"]["torch"] == importlib.metadata.version("torch") and None not in start["packages"]


def test_the_record_says_what_the_run_was(recorded, few_samples):
    first, second = json.loads((recorded / "run_record.json").read_text())
    assert first["packages"]["torch"] == importlib.metadata.version("torch") and first["device"] == "cpu"
    assert first["files, sha256"][few_samples[0]] == hashlib.sha256(Path(few_samples[0]).read_bytes()).hexdigest()
    assert first["identity"]["training data"] == second["identity"]["training data"]
    config = first["DeepSpeed configuration"]
    assert config["optimizer"]["params"]["weight_decay"] == 0.5 and config["train_micro_batch_size_per_gpu"] == 8
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        # Git refuses a directory that belongs to someone else.
        assert first["commit"] is None if head.returncode else first["commit"].startswith(head.stdout.strip())


@pytest.mark.parametrize(
    "text, told",
    [
        (None, "No such file or directory"),
        ("{", "not JSON"),
        ("[1]", "must be one JSON object"),
        ('{"lora_rank": 8}', "there is no flag --lora_rank"),
        ('{"lora_dim": "much"}', "argument --lora_dim: invalid int value: 'much'"),
        ('{"lora_dim": [8]}', "lora_dim must be a number or a text"),
        ('{"is_skip": 1}', "is_skip must be true or false"),
        ('{"config": "other.json"}', "there is no flag --config"),
        ('{"packing": "sideways"}', "argument --packing: invalid choice"),
    ],
)
def test_a_wrong_file_of_flags_is_one_line(tmp_path, capsys, text, told):
    path = tmp_path / "flags.json"
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit) as end:
        train.main(["--config", str(path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"error: --config {path}: ") and told in line
