"""Which adapter of a run is the best, what names it, and when a run stops for want of a better one."""

from dataclasses import asdict

import pytest

import merge_params
import train
import web_demo
from support.files import followed
from support.training.checkpoints import Best, checkpoints


def test_the_lowest_loss_is_named_and_kept(tmp_path):
    best, left = Best(), []
    for step, loss in enumerate([3.0, 2.0, 2.0, 2.5, 1.0], start=1):
        name = f"epoch-1-step-{step}"
        (tmp_path / "run" / name).mkdir(parents=True)
        best = Best(**asdict(best))  # as in a run that is resumed after each save
        best.add(name, loss)
        best.keep(tmp_path / "run", limit=1)
        left.append([path.name[-1] for _, path in checkpoints(tmp_path / "run")])
        assert followed(tmp_path / "run/best") == tmp_path / "run" / best.name
    assert left == [["1"], ["2"], ["2", "3"], ["2", "4"], ["5"]]
    moved = (tmp_path / "run").rename(tmp_path / "moved")  # the link goes with it
    for script, flag in ((merge_params, "model_dir"), (web_demo, "adapter_path")):
        others = ["--ori_model_dir", "x", "--save_model_dir", "y"] if script == merge_params else []
        args = script.parse_args([*others, f"--{flag}", str(moved / "best")])
        assert getattr(args, flag) == moved / "epoch-1-step-5"


def test_patience_also_over_a_resume(train_arguments, monkeypatch, tmp_path, capsys):
    """Killed while it counts, the run stops where it would have stopped; with more patience it goes on."""
    losses = []

    def evaluation(*_):
        loss = losses.pop(0)
        if isinstance(loss, BaseException):
            raise loss
        return loss

    monkeypatch.setattr(train.utils, "evaluation", evaluation)
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
