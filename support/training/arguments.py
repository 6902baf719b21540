"""What is wrong with train.py's arguments and its DeepSpeed file, all of it at once."""

import math
import re
from pathlib import Path

from support.command_line import number_problems
from support.device import MOST_TOKENS
from support.errors import Problems
from support.files import read_object, unwritable
from support.training.checkpoints import checkpoints, newest_state


def refuse_wrong_arguments(args, model_directory):
    """Raise UserError with all that is wrong with train.py's arguments and the files they name, but for the samples."""
    with Problems() as problems:
        problems += argument_problems(args)
        problems += problems.of(model_problems, args, model_directory) or []
        problems += [
            f"{path}: there is no such file" for path in (args.train_path, args.test_path) if not Path(path).is_file()
        ]
        problems.of(read_deepspeed_config, args.ds_file)


def tokens_or_auto(text: str) -> int:
    return MOST_TOKENS if text == "auto" else int(text)


def argument_problems(args) -> list[str]:
    positive = ("max_len", "max_src_len", "lora_dim", "per_device_train_batch_size", "gradient_accumulation_steps")
    positive += ("num_train_epochs", "show_loss_step", "max_pack_len", "save_total_limit", "patience")
    least = dict.fromkeys(positive, 1) | dict.fromkeys(("save_model_step", "eval_steps", "sample_answers", "seed"), 0)
    problems = number_problems(args, least)
    for name in ("learning_rate", "lora_alpha"):
        if not 0 < getattr(args, name) < math.inf:
            problems.append(f"--{name} must be positive, not {getattr(args, name)}")
    if problem := unwritable(args.output_dir):
        problems.append(f"--output_dir {args.output_dir}: cannot be written: {problem}")
    elif re.search("[\ud800-\udfff]", args.output_dir):  # how Python holds bytes of a name that are no text
        problems.append(
            f"--output_dir {args.output_dir}: TensorBoard takes names in UTF-8 only: name another directory"
        )
    elif not args.resume and (newest_state(args.output_dir)[1] or checkpoints(args.output_dir)):
        problems.append(
            f"{args.output_dir}: holds a run already; --resume goes on with it, or name another --output_dir"
        )
    for name, end in (("lora_dropout", 1), ("warmup_ratio", 1), ("weight_decay", math.inf)):
        if not 0 <= getattr(args, name) < end:
            problems.append(f"--{name} must be in [0, {end}), not {getattr(args, name)}")
    if args.packing == "tree" and args.max_pack_len < args.max_len:
        problems.append(
            f"--max_pack_len {args.max_pack_len} is less than --max_len {args.max_len}: a row holds a sample"
        )
    if args.packing == "tree" and args.attn_implementation == "flash_attention_2":
        problems.append(
            "--attn_implementation flash_attention_2 knows no rows of trees: choose sdpa, or --packing none"
        )
    return problems


def model_problems(args, model_directory) -> list[str]:
    """Where the model does not go with the flags. Raises: UserError with what its directory lacks."""
    model_directory.check(args.load_in_4bit)
    return [
        f"--{name} {getattr(args, name)} exceeds the model's {limit}, {getattr(model_directory.config, limit)}"
        for name, limit in (("max_len", "model_max_length"), ("lora_dim", "hidden_size"))
        if getattr(args, name) > getattr(model_directory.config, limit)
    ]


def read_deepspeed_config(path) -> dict:
    """Read the DeepSpeed file and check what this project relies on; DeepSpeed checks the rest. Raises: UserError."""
    config = read_object(path)
    sections = {key: config.get(key, {}) for key in ("zero_optimization", "optimizer", "bf16", "fp16")}
    with Problems() as problems:
        for key in ("scheduler", "train_batch_size", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
            if key in config:
                problems.append(f"{path}: remove {key}: train.py's flags decide it")
        problems += [
            f"{path}: {key} must be an object" for key, value in sections.items() if not isinstance(value, dict)
        ]
    zero, optimizer, bf16, fp16 = sections.values()
    clipping = config.get("gradient_clipping", 0.0)
    with Problems() as problems:
        if zero.get("stage") not in (1, 2):
            problems.append(f"{path}: zero_optimization.stage must be 2 (or 1): only adapters are trained here")
        data_types = config.get("data_types", {})
        if zero.get("stage") == 1 and isinstance(data_types, dict) and data_types.get("grad_accum_dtype"):
            problems.append(f"{path}: data_types.grad_accum_dtype needs zero_optimization.stage 2 here")
        for key, section in (("bf16", bf16), ("fp16", fp16)):
            if not isinstance(section.get("enabled", False), bool):
                problems.append(f"{path}: {key}.enabled must be true or false")
        if bf16.get("enabled") and fp16.get("enabled"):
            problems.append(f"{path}: enable bf16 or fp16, not both; neither gives float32")
        if isinstance(clipping, bool) or not isinstance(clipping, (int, float)) or not 0 <= clipping < math.inf:
            problems.append(f"{path}: gradient_clipping must be a number, 0 or more, not {clipping!r}")
        if "type" not in optimizer:
            problems.append(f'{path}: optimizer.type is missing; "AdamW" with "torch_adam": true needs no compiler')
        parameters = optimizer.setdefault("params", {})
        if not isinstance(parameters, dict) or not isinstance(parameters.setdefault("torch_adam", True), bool):
            problems.append(f"{path}: optimizer.params must be an object, and its torch_adam true or false")
    config.setdefault("steps_per_print", 10**9)
    return config
