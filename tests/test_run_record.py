"""What a run's directory holds to repeat it, and --config, which reads it."""

import importlib.metadata
import json
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, adapter_weights

import train
import utils
from support.training import run_record


def test_a_run_is_repeated_from_its_directory(train_arguments, tmp_path):
    """Nothing but the file of flags and another directory; what the line says wins."""
    flags = ["--sample_answers", 0, "--gradient_checkpointing", "--weight_decay", 0.5, "--resume", "--seed", 3]
    train.main(train_arguments(tmp_path / "run", *flags))
    config = str(tmp_path / "run/train_args.json")
    args = train.parse_args(["--config", config, "--lora_dim", "8", "--no-gradient_checkpointing"])
    assert (args.lora_dim, args.gradient_checkpointing, args.weight_decay) == (8, False, 0.5)
    assert args.seed == 3 and not args.resume and args.save_total_limit is None
    train.main(["--config", config, "--output_dir", str(tmp_path / "again")])
    ours, theirs = (adapter_weights(tmp_path / name / "epoch-1-step-5") for name in ("again", "run"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    again, first = (json.loads((tmp_path / name / "train_args.json").read_text()) for name in ("again", "run"))
    assert again | {"output_dir": first["output_dir"], "made_with": first["made_with"]} == first  # or someone commits


def test_the_record_says_with_what_the_run_was_made(tmp_path, monkeypatch):
    (tmp_path / "broken-1.0.dist-info").mkdir()  # what pip has left of a package
    monkeypatch.syspath_prepend(tmp_path)
    run_record.keep_record(SimpleNamespace(output_dir=str(tmp_path)))
    made_with = json.loads((tmp_path / "train_args.json").read_text())["made_with"]
    assert made_with["packages"]["torch"] == importlib.metadata.version("torch") and "null" not in made_with["packages"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        # Git refuses a directory that belongs to someone else.
        assert made_with["commit"] is None if head.returncode else made_with["commit"].startswith(head.stdout.strip())


def test_what_is_said_of_a_run(capsys):
    steps = utils.Steps(range(105), None, 10, 3, seed=0, world=2)
    engine = SimpleNamespace(
        module=SimpleNamespace(print_trainable_parameters=lambda: None), device=torch.device("cuda")
    )
    args = SimpleNamespace(dry_run=True, resume=False, output_dir="out")
    run_record.announce(args, engine, steps, 0, None, torch.bfloat16)
    assert capsys.readouterr().out == "30 steps of 10 samples, 10 an epoch; bfloat16 on 2 × cuda; to out\n"


def test_a_wrong_file_of_flags_is_told(tmp_path):
    (tmp_path / "flags.json").write_text('{"lora_rank": 8}')
    with pytest.raises(train.UserError, match="unrecognized arguments: --lora_rank=8"):
        train.parse_args(["--config", str(tmp_path / "flags.json")])
