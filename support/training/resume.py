"""States: what an interrupted run needs to go on, bit for bit. Written whole or not at all, and without frozen weights.

    output_dir/state/epoch-1-step-300/
        run.json        what the run is, so that no other one goes on from here, and the log's unfinished mean
        process-0.pt    of each process: adapters, its share of the optimizer, the step of the learning-rate curve

The order of the samples and the random numbers of dropout follow from the step and --seed, so nothing is kept of them.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from support.errors import OneProcessError, Problems, UserError, blaming, first_line, out_of_memory
from support.files import fingerprint, put_on_disk, read_object, remove_directory, rename_directory, writing
from support.training.checkpoints import Best, checkpoints, newest_state
from support.training.processes import rank_and_world_size
from utils import RoleDataset


def claim(output_dir: Path, dry_run: bool):
    """Keep other runs out of `output_dir`, and remove what killed ones left half-written. Called by all processes.

    It comes before anything is read there, which another run may be replacing. A dry run makes no lock, but heeds one.
    A `deepspeed` command that is killed leaves its processes behind. The lock ends with the first of them.
    Raises: UserError, also on a host that sees another directory by that name.
    """
    path = output_dir / ".lock"
    if dist.get_rank() == 0 and not (dry_run and not path.exists()):
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # stays open, since closing it ends the lock
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output_dir}: another run is writing there: wait, or name another --output_dir") from None
        except OSError:
            pass  # some network disks have no locks
        for left in [*output_dir.glob(".epoch-*.tmp"), *output_dir.glob("state/.epoch-*.tmp")]:
            shutil.rmtree(left)
    dist.barrier()
    if not (dry_run or path.exists()):
        raise OneProcessError(f"{output_dir}: is not what the first host writes to: all need one on a shared disk")


def run_identity(args, base: str, train_data: RoleDataset, test_data: RoleDataset, dtype: torch.dtype) -> dict:
    """All that decides the result of a run to the last bit, and which adapter is its best. `base`: the model's fingerprint."""
    flags = ("num_train_epochs", "learning_rate", "weight_decay", "warmup_ratio", "seed", "load_in_4bit")
    flags += ("lora_dim", "lora_alpha", "lora_dropout", "gradient_accumulation_steps", "per_device_train_batch_size")
    return {
        "training data": data_fingerprint(train_data),
        "test data": data_fingerprint(test_data),
        "base weights": base,
        "processes": rank_and_world_size()[1],
        "DeepSpeed configuration": fingerprint(json.dumps(read_object(args.ds_file), sort_keys=True)),
        "precision": str(dtype),
        **{f"--{name}": getattr(args, name) for name in flags},
    }


def data_fingerprint(data: RoleDataset) -> str:
    return fingerprint(data.ids, data.starts, data.loss_positions, data.loss_starts, data.persona, str(data.personas))


def find_state(output_dir, identity: dict) -> tuple[int, Path | None, list[float], Best]:
    """(steps done, the state to go on from, losses since the log's last report, the best adapter so far).

    Raises: UserError where hosts differ in `identity`, see `run_identity`, or the state is of another run.
    """
    done, state = newest_state(output_dir)
    ours, of_all = identity | {"the state in --output_dir": done}, [None] * dist.get_world_size()
    dist.all_gather_object(of_all, ours)
    if differing := [name for name in ours if any(others[name] != ours[name] for others in of_all)]:
        raise UserError(f"the processes differ in {', '.join(differing)}: give all hosts the same files and flags")
    if state is None:
        return 0, None, [], Best()
    with blaming(f"{state}: is damaged: remove it, and --resume goes on from an older state or anew"):
        run = read_object(state / "run.json")
        saved, losses, best = run["identity"], [float(loss) for loss in run["losses"]], Best(**run["best"])
        differing = [name for name in identity if saved.get(name) != identity[name]]
    with Problems() as problems:
        for name in differing:
            saved_with = f"{state}: was saved with {name} {saved.get(name)}, not {identity[name]}"
            problems.append(f"{saved_with}: change that back, or start in another --output_dir")
    return done, state, losses, best


def save_state(engine, directory: Path, run: dict):
    """Write a state from all processes at once; it gets its name when it is complete, and older ones go.

    DeepSpeed's own save_checkpoint writes objects of its classes, which only a pickle that may run code brings back.
    run: `identity`, what the run is; `losses`, those since the log's last report; `best`, the fields of `Best`.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    rank = dist.get_rank()
    if rank == 0:
        temporary.mkdir(parents=True)
    dist.barrier()
    with writing(directory):
        torch.save(_parts(engine), temporary / f"process-{rank}.pt")
        put_on_disk(temporary / f"process-{rank}.pt")
    dist.barrier()
    if rank == 0:
        with writing(directory):
            (temporary / "run.json").write_text(json.dumps(run, indent=2))
            rename_directory(temporary, directory)
        for _, old in checkpoints(directory.parent)[:-1]:
            remove_directory(old)
    dist.barrier()


def load_state(engine, state: Path):
    """Put adapters, optimizer, schedule and loss scale back where `save_state` found them. Raises: UserError."""
    path = state / f"process-{dist.get_rank()}.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # tensors and numbers, never code
        ours = _parts(engine)
        for kind in ("adapters", "master weights"):
            for tensor, values in zip(ours[kind], saved[kind], strict=True):
                tensor.copy_(values)
        engine.optimizer.optimizer.load_state_dict(saved["optimizer"])
        engine.lr_scheduler.load_state_dict(saved["schedule"])
        vars(engine.optimizer.loss_scaler).update(saved["loss scale"])
    except Exception as error:  # what a damaged file does to torch, pickle and DeepSpeed has no common class
        if out_of_memory(error):
            raise
        raise OneProcessError(f"{path}: is damaged, or no state of this run: {first_line(error)}") from error


def _parts(engine) -> dict:
    """ZeRO-2 keeps on each process the adapters whole, but its share only of their float32 copy and of Adam's moments."""
    zero = engine.optimizer
    return {
        "adapters": [parameter.data for parameter in engine.module.parameters() if parameter.requires_grad],
        "master weights": [partition.data for partition in zero.single_partition_of_fp32_groups],
        "optimizer": zero.optimizer.state_dict(),
        "schedule": engine.lr_scheduler.state_dict(),
        "loss scale": {k: v for k, v in vars(zero.loss_scaler).items() if isinstance(v, (bool, int, float))},
    }
