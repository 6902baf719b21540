"""What is told and kept of a training run, for the one who started it.

output_dir/train_args.json    the flags in force, for `train.py --config`
output_dir/run_record.json    a list, of each start: commit, versions of the packages, digests of the data, the
                              DeepSpeed configuration in force, the device
"""

import json
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

import torch

from support.errors import UserError
from support.files import file_digest, whole_files
from support.training.checkpoints import newest_state
from utils import Steps


def introduce(
    model,
    steps: Steps,
    done: int,
    state: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    output_dir: str,
    resume: bool,
):
    """Say what will be trained, from which state on. done: steps of that state."""
    model.print_trainable_parameters()
    where = f"{str(dtype).removeprefix('torch.')} on {steps.world} × {device.type}"
    print(
        f"{len(steps):,} steps of {steps.step_size} samples, {steps.steps_per_epoch:,} an epoch; {where}; to {output_dir}"
    )
    if resume and state:
        print(f"going on from {state}")
    elif resume:
        print(f"{output_dir}: no state is saved there yet; starting anew")
    if done == len(steps):
        print(f"{output_dir}: is complete, nothing is left to do")


OF_ONE_START = ("resume", "dry_run", "local_rank", "config")  # flags that no later run should repeat


def keep_record(args, identity: dict, config: dict, device: torch.device):
    """Write beside the adapters all that it takes to repeat the run.

    Args:
        identity: what decides the run's result, see support/training/resume.py.
        config: the DeepSpeed configuration, as the flags and the device have completed it.
    """
    output_dir = Path(args.output_dir)
    files = {path: file_digest(path) for path in (args.train_path, args.test_path, args.ds_file)}
    start = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": sys.version.split()[0],
        # Without a name is what pip has left of a package that it could not remove.
        "packages": dict(sorted((found.name, found.version) for found in distributions() if found.name)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "files, sha256": files,
        "identity": identity,
        "DeepSpeed configuration": config,
    }
    with whole_files(output_dir / "train_args.json", output_dir / "run_record.json") as (arguments, record):
        kept = {name: value for name, value in vars(args).items() if name not in OF_ONE_START}
        json.dump(kept, arguments, ensure_ascii=False, indent=2)
        json.dump([*starts_before(output_dir / "run_record.json"), start], record, ensure_ascii=False, indent=2)


def starts_before(path: Path) -> list[dict]:
    """What a run that is resumed has recorded so far."""
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or a file that somebody has edited
        return []
    return starts if isinstance(starts, list) else []


def commit() -> str | None:
    """The commit of this checkout, with a note where files differ from it. None: it is no checkout, or git is missing."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", root, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=, and changes since"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def diverged(output_dir, what: str, steps: Steps | None = None, step: int = 0) -> UserError:
    """Why the run cannot go on, and what a user can do. steps, step: those of the training that went wrong."""
    told = ""
    if steps:
        numbers = steps.data.numbers[steps.samples(step - 1)]
        told = f", with samples {', '.join(map(str, numbers))}; look at them"
    return UserError(
        f"{what}{told}; lower --learning_rate or train in another precision. "
        f"{newest_state(output_dir)[1] or 'No state'} is the last one saved"
    )
