"""Which adapter of a run is the best, what names it, and when a run stops for want of a better one."""

import shutil
from pathlib import Path

import pytest
from conftest import adapter_weights, scalars

import merge_params
import train
import web_demo
from support.files import followed
from support.training.checkpoints import Best, checkpoints


@pytest.fixture(params=["links", "no links"])
def file_system(request, monkeypatch):
    if request.param == "no links":

        def refuse(*_):
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(Path, "symlink_to", refuse)
    return request.param


def test_the_lowest_loss_is_named_and_kept(file_system, tmp_path):
    best, left = Best(tmp_path, None), []
    for step, loss in enumerate([3.0, 2.0, 2.0, 2.5, 1.0], start=1):
        name = f"epoch-1-step-{step}"
        (tmp_path / name).mkdir()
        best.add(name, loss)
        best.keep(limit=1)
        left.append([path.name[-1] for _, path in checkpoints(tmp_path)])
        assert followed(tmp_path / "best") == tmp_path / best.name
        assert followed(tmp_path / best.name) == tmp_path / best.name
    assert left == [["1"], ["2"], ["2", "3"], ["2", "4"], ["5"]]
    assert (tmp_path / "best").is_symlink() == (file_system == "links")
    for script, flag in ((merge_params, "model_dir"), (web_demo, "adapter_path")):
        others = ["--ori_model_dir", "x", "--save_model_dir", "y"] if script == merge_params else []
        args = script.parse_args([*others, f"--{flag}", str(tmp_path / "best")])
        assert getattr(args, flag) == tmp_path / "epoch-1-step-5"


def test_a_link_goes_with_its_directory(tmp_path):
    (tmp_path / "run/epoch-1-step-3").mkdir(parents=True)
    best = Best(tmp_path / "run", None)
    best.add("epoch-1-step-3", 1.0)
    best.keep(None)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert followed(moved / "best") == moved / "epoch-1-step-3" and followed(moved / "best").is_dir()
    copy = shutil.copytree(moved, tmp_path / "copy")  # in which `best` is a directory
    assert followed(copy / "best") == copy / "best"
    again = Best(copy, best.state())
    again.keep(None)
    assert followed(copy / "best") == copy / "epoch-1-step-3"


@pytest.fixture
def losses(monkeypatch):
    """The losses on the test set, one an evaluation; an exception is raised there."""
    found = []

    def evaluation(*_):
        if isinstance(found[0], BaseException):
            raise found.pop(0)
        return found.pop(0)

    monkeypatch.setattr(train.utils, "evaluation", evaluation)
    return found


def test_patience_also_over_a_resume(train_arguments, losses, tmp_path, capsys):
    """Killed while it counts, the run stops where it would have stopped; with more patience it goes on."""
    flags = ["--save_model_step", 1, "--save_total_limit", 1, "--sample_answers", 0]
    losses += [3.0, 2.0, 2.5, KeyboardInterrupt()]
    with pytest.raises(SystemExit) as end:
        train.main(train_arguments(tmp_path, *flags, "--patience", 2))
    assert end.value.code == 130
    losses += [2.4]
    train.main(train_arguments(tmp_path, *flags, "--patience", 2, "--resume"))
    told = "epoch-1-step-2 with a loss of 2.0000 is the best adapter; stopped, since 2 saves brought no better one"
    assert told in capsys.readouterr().out
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 4]
    train.main(train_arguments(tmp_path, *flags, "--patience", 2, "--resume"))
    assert told in capsys.readouterr().out and not losses
    losses += [1.9]
    train.main(train_arguments(tmp_path, *flags, "--patience", 3, "--resume"))
    assert "epoch-1-step-5 with a loss of 1.9000 is the best adapter\n" in capsys.readouterr().out
    assert [step for step, _ in checkpoints(tmp_path)] == [5]


def test_what_is_evaluated_between_saves_is_only_logged(train_arguments, tmp_path):
    """A perplexity more changes no adapter, and what is not saved is never the best."""
    flags = ["--save_model_step", 3, "--sample_answers", 0, "--lora_dropout", 0.1]
    for name, more in (("with", ["--eval_steps", 2]), ("without", [])):
        train.main(train_arguments(tmp_path / name, *flags, *more))
    assert [step for step, _ in scalars(tmp_path / "with", "test_loss")] == [2, 3, 4, 5]
    assert [step for step, _ in scalars(tmp_path / "without", "test_loss")] == [3, 5]
    ours, theirs = (adapter_weights(tmp_path / name / "epoch-1-step-5") for name in ("with", "without"))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    losses = {step: loss for step, loss in scalars(tmp_path / "with", "test_loss") if step in (3, 5)}
    assert followed(tmp_path / "with/best").name == f"epoch-1-step-{min(losses, key=losses.get)}"
