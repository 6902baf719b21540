"""What is told and kept of a training run, for the one who started it."""

import json
from pathlib import Path

from support.errors import UserError
from support.files import newest_state, whole_files


def introduce(args, model, steps, done: int, state: Path | None, where: str):
    """Say what will be trained, and keep the arguments beside it. steps: utils.Steps."""
    if not args.dry_run:
        with whole_files(Path(args.output_dir) / "train_args.json") as (file,):
            json.dump(vars(args), file, ensure_ascii=False, indent=2)
    model.print_trainable_parameters()
    print(f"{len(steps):,} steps of {steps.step_size} samples, {steps.steps_per_epoch:,} an epoch; {where}")
    if args.resume:
        print(f"going on from {state}" if state else f"{args.output_dir}: no state is saved there yet; starting anew")
    if done == len(steps):
        print(f"{args.output_dir}: is complete, nothing is left to do")


def broken(args, steps, step: int, what: str) -> UserError:
    """Why the run cannot go on, and what a user can do."""
    numbers = ", ".join(map(str, steps.data.numbers[steps.samples(step - 1)]))
    return UserError(
        f"{args.train_path}: {what}, with samples {numbers}; look at them, lower --learning_rate or train in "
        f"another precision. {newest_state(args.output_dir)[1] or 'No state'} is the last one saved"
    )
