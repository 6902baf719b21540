"""What is told and kept of a training run, for the one who started it."""

import json
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path

import torch

from support.errors import UserError
from support.files import whole_files
from support.training.checkpoints import newest_state
from utils import Steps

OF_ONE_START = ("resume", "dry_run", "local_rank", "config")  # flags that no later run should repeat


def announce(args, engine, steps: Steps, done: int, state: Path | None, dtype: torch.dtype):
    """Say what will be trained, going on from `state` after `done` steps. On the main process."""
    engine.module.print_trainable_parameters()
    samples = f"{steps.step_size} samples, {steps.steps_per_epoch:,} an epoch"
    device = f"{str(dtype).removeprefix('torch.')} on {steps.world} × {engine.device.type}"
    print(f"{len(steps):,} steps of {samples}; {device}; to {args.output_dir}")
    if state:
        print(f"going on from {state}")
    elif args.resume:
        print(f"{args.output_dir}: no state is saved there yet; starting anew")
    if done == len(steps):
        print(f"{args.output_dir}: is complete, nothing is left to do")


def keep_record(args):
    """Write train_args.json: the flags in force, for `train.py --config`, and with what the run was made."""
    flags = {name: value for name, value in vars(args).items() if name not in OF_ONE_START}
    # What pip has left of a package that it could not remove has no name.
    packages = dict(sorted((str(package.name), package.version) for package in distributions()))
    made_with = {"commit": commit(), "python": sys.version.split()[0], "packages": packages}
    with whole_files(Path(args.output_dir) / "train_args.json") as (file,):
        json.dump({**flags, "made_with": made_with}, file, ensure_ascii=False, indent=2)


def commit() -> str | None:
    """The commit of this checkout, with a note where files differ from it; None without a checkout, or without git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=, and changes since"]
    with suppress(OSError):
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip() or None


def diverged(output_dir, what: str) -> UserError:
    """Why the run cannot go on, and what a user can do."""
    last = newest_state(output_dir)[1] or "No state"
    return UserError(f"{what}; lower --learning_rate or train in another precision. {last} is the last one saved")
