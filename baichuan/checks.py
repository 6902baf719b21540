"""What can be wrong with a training run, found out before anything slow and told together."""

import json
import math
import re
from pathlib import Path

from baichuan.loading import load_config, model_directory_problems
from baichuan.script import UserError, number_problems, unwritable
from baichuan.states import checkpoints, newest_state


def refuse_wrong_arguments(args):
    """Raise UserError with all that is wrong with train.py's arguments and the files they name, but for the samples."""
    problems = argument_problems(args) + model_problems(args)
    problems += [
        f"{path}: there is no such file" for path in (args.train_path, args.test_path) if not Path(path).is_file()
    ]
    try:
        deepspeed_config(args)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)


def argument_problems(args) -> list[str]:
    positive = ("max_len", "max_src_len", "lora_dim", "per_device_train_batch_size", "gradient_accumulation_steps")
    positive += ("num_train_epochs", "show_loss_step", "max_pack_len", "save_total_limit")
    least = dict.fromkeys(positive, 1) | dict.fromkeys(("save_model_step", "sample_answers", "seed"), 0)
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
    if args.packing == "prefix" and args.max_pack_len < args.max_len:
        problems.append(
            f"--max_pack_len {args.max_pack_len} is less than --max_len {args.max_len}: a row holds a sample"
        )
    if args.packing == "prefix" and args.attn_implementation == "flash_attention_2":
        problems.append("--attn_implementation flash_attention_2 knows no prefix rows: choose sdpa, or --packing none")
    return problems


def model_problems(args) -> list[str]:
    """What the model's directory lacks, and where it does not go with the flags."""
    if problems := model_directory_problems(args.model_name_or_path):
        return problems
    try:
        config = load_config(args.model_name_or_path)
    except UserError as error:
        return error.problems
    return [
        f"--{name} {getattr(args, name)} exceeds the model's {limit}, {getattr(config, limit)}"
        for name, limit in (("max_len", "model_max_length"), ("lora_dim", "hidden_size"))
        if getattr(args, name) > getattr(config, limit)
    ]


def machine_integer(digits: str) -> int:
    """Raises: ValueError: more than 64 bits, which DeepSpeed would find out in the middle of a step."""
    if abs(number := int(digits)) >= 2**63:
        raise ValueError(f"the number {digits} is too large")
    return number


def deepspeed_config(args) -> dict:
    """The DeepSpeed file with the values that the flags decide. Raises: UserError."""
    try:
        config = json.loads(Path(args.ds_file).read_text(encoding="utf-8"), parse_int=machine_integer)
    except OSError as error:
        raise UserError(f"{args.ds_file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{args.ds_file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{args.ds_file}: must be one JSON object")
    problems = []
    for key in ("scheduler", "train_batch_size", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
        if key in config:
            problems.append(f"{args.ds_file}: remove {key}: train.py's flags decide it")
    sections = {key: config.get(key, {}) for key in ("zero_optimization", "optimizer", "bf16", "fp16")}
    for key, section in sections.items():
        if not isinstance(section, dict):
            problems.append(f"{args.ds_file}: {key} must be an object")
    if problems:
        raise UserError(*problems)
    if sections["zero_optimization"].get("stage") not in (1, 2):
        problems.append(f"{args.ds_file}: zero_optimization.stage must be 2 (or 1): only adapters are trained here")
    for key in ("bf16", "fp16"):
        if not isinstance(sections[key].get("enabled", False), bool):
            problems.append(f"{args.ds_file}: {key}.enabled must be true or false")
    if sections["bf16"].get("enabled") and sections["fp16"].get("enabled"):
        problems.append(f"{args.ds_file}: enable bf16 or fp16, not both; neither gives float32")
    clipping = config.get("gradient_clipping", 0.0)
    if isinstance(clipping, bool) or not isinstance(clipping, (int, float)) or not 0 <= clipping < math.inf:
        problems.append(f"{args.ds_file}: gradient_clipping must be a number, 0 or more, not {clipping!r}")
    if "type" not in sections["optimizer"]:
        problems.append(f'{args.ds_file}: optimizer.type is missing; "AdamW" with "torch_adam": true needs no compiler')
    params = sections["optimizer"].setdefault("params", {})
    if not isinstance(params, dict) or not isinstance(params.setdefault("torch_adam", True), bool):
        problems.append(f"{args.ds_file}: optimizer.params must be an object, and its torch_adam true or false")
    if problems:
        raise UserError(*problems)
    params.update(lr=args.learning_rate, weight_decay=args.weight_decay)
    # A step's backward passes are summed by hand (their number varies), so to DeepSpeed every step is one micro-batch.
    config["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size * args.gradient_accumulation_steps
    config["gradient_accumulation_steps"] = 1
    config.setdefault("steps_per_print", 10**9)
    return config
