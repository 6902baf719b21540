"""What is wrong with train.py's arguments and its DeepSpeed file, all of it at once."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from support.command_line import integer
from support.device import MOST_TOKENS
from support.errors import Problems, UserError, blaming
from support.files import read_object, unwritable
from support.training.checkpoints import checkpoints, newest_state

OF_MATRICES = {"adafactor", "lamb", "muadam", "muadamw", "muon", "musgd"}  # see one_parameter.py


def tokens_or_auto(text: str) -> int:
    return MOST_TOKENS if text == "auto" else integer(1)(text)


def refuse_wrong_arguments(args, model_directory):
    """Raise UserError with all that is wrong with train.py's arguments and the files they name, but for the samples."""
    import torch

    on_gpu = os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    flex_attention = args.attn_implementation == "flex_attention"
    with Problems() as problems:
        if problems.of(model_directory.check, args.load_in_4bit):
            longest = model_directory.config.model_max_length
            if args.max_len > longest:
                problems.append(f"--max_len {args.max_len} exceeds the model's model_max_length, {longest}")
        for path in (args.train_path, args.test_path):
            if not Path(path).is_file():
                problems.append(f"{path}: there is no such file")
        problems.of(read_deepspeed_config, args.ds_file)
        if problem := unwritable(args.output_dir):
            problems.append(f"--output_dir {args.output_dir}: cannot be written: {problem}")
        elif not args.resume and (newest_state(args.output_dir)[1] or checkpoints(args.output_dir)):
            problems.append(f"{args.output_dir}: holds a run already; --resume goes on with it, or name another one")
        if args.packing == "tree" and args.max_pack_len < args.max_len:
            problems.append(f"--max_pack_len {args.max_pack_len} is less than --max_len {args.max_len}, of a sample")
        if args.packing == "tree" and args.attn_implementation == "flash_attention_2":
            problems.append("--attn_implementation flash_attention_2: knows no trees: take sdpa, or --packing none")
        if flex_attention and not on_gpu:
            problems.append("--attn_implementation flex_attention: trains on a GPU only: take sdpa")
        if (args.compile or flex_attention and on_gpu) and (needed := missing_compiler(on_gpu)):
            problems.append(f"--compile and flex_attention need {needed}")


def missing_compiler(on_gpu: bool) -> str | None:
    """What torch.compile needs where something of it is missing. It compiles C++ for the CPU; for a GPU Triton compiles C."""
    default = ["gcc", "clang"] if on_gpu else ["g++"]
    named = os.environ.get("CC" if on_gpu else "CXX")
    compilers = [named] if named else default
    header = Path(sysconfig.get_path("include"), "Python.h")
    if any(map(shutil.which, compilers)) and header.is_file():
        return None
    python = "python{}.{}".format(*sys.version_info)
    return f"{' or '.join(compilers)}, and {header}: apt-get install g++ {python}-dev"


def read_deepspeed_config(path) -> dict:
    """Read the DeepSpeed file and check what this project relies on; DeepSpeed checks the rest. Raises: UserError."""
    config = read_object(path)
    of_flags = {"scheduler", "train_batch_size", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"}
    if found := sorted(of_flags & config.keys()):
        raise UserError(f"{path}: remove {', '.join(found)}: train.py's flags decide it")
    with blaming(f"{path}: is not laid out like ds_zero2_no_offload.json"):
        if config.get("zero_optimization", {}).get("stage") not in (1, 2):
            raise UserError(f"{path}: zero_optimization.stage must be 2 (or 1): only adapters are trained here")
        for key in ("bf16", "fp16"):  # of which DeepSpeed reads "auto" as false
            if not isinstance(config.setdefault(key, {}).get("enabled", False), bool):
                raise UserError(f"{path}: {key}.enabled must be true or false")
        config["gradient_clipping"] = float(config.get("gradient_clipping", 0))
        optimizer = {"type": "AdamW", "params": {}} | config.get("optimizer", {})
        if optimizer["type"].lower() in OF_MATRICES:
            raise UserError(
                f"{path}: {optimizer['type']} looks at matrices, and adapters are one vector here: take AdamW"
            )
        if optimizer["type"].lower() in ("adam", "adamw"):
            optimizer["params"] = {"torch_adam": True} | optimizer["params"]  # needs no compiler
        config["optimizer"] = optimizer
    return {"steps_per_print": 10**9} | config
