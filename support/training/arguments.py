"""What is wrong with train.py's arguments and its DeepSpeed file, all of it at once."""

from pathlib import Path

from support.command_line import integer
from support.device import MOST_TOKENS
from support.errors import Problems, UserError
from support.files import read_object, unwritable
from support.training.checkpoints import checkpoints, newest_state


def tokens_or_auto(text: str) -> int:
    return MOST_TOKENS if text == "auto" else integer(1)(text)


def refuse_wrong_arguments(args, model_directory):
    """Raise UserError with all that is wrong with train.py's arguments and the files they name, but for the samples."""
    with Problems() as problems:
        problems.of(check_model, args, model_directory)
        for path in (args.train_path, args.test_path):
            if not Path(path).is_file():
                problems.append(f"{path}: there is no such file")
        problems.of(read_deepspeed_config, args.ds_file)
        if problem := unwritable(args.output_dir):
            problems.append(f"--output_dir {args.output_dir}: cannot be written: {problem}")
        elif not args.resume and (newest_state(args.output_dir)[1] or checkpoints(args.output_dir)):
            remedy = "--resume goes on with it, or name another --output_dir"
            problems.append(f"{args.output_dir}: holds a run already; {remedy}")
        if args.packing == "tree" and args.max_pack_len < args.max_len:
            lengths = f"--max_pack_len {args.max_pack_len} is less than --max_len {args.max_len}"
            problems.append(f"{lengths}: a row holds a sample")
        if args.packing == "tree" and args.attn_implementation == "flash_attention_2":
            kernels = "--attn_implementation flash_attention_2"
            problems.append(f"{kernels} knows no rows of trees: choose sdpa, or --packing none")


def check_model(args, model_directory):
    model_directory.check(args.load_in_4bit)
    longest = model_directory.config.model_max_length
    if args.max_len > longest:
        raise UserError(f"--max_len {args.max_len} exceeds the model's model_max_length, {longest}")


def read_deepspeed_config(path) -> dict:
    """Read the DeepSpeed file and check what this project relies on; DeepSpeed checks the rest. Raises: UserError."""
    config = read_object(path)
    with Problems() as problems:
        for key in ("scheduler", "train_batch_size", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
            if key in config:
                problems.append(f"{path}: remove {key}: train.py's flags decide it")
        for key in ("zero_optimization", "optimizer", "bf16", "fp16"):
            if not isinstance(config.setdefault(key, {}), dict):
                problems.append(f"{path}: {key} must be an object, as in ds_zero2_no_offload.json")
            elif not isinstance(config[key].get("enabled", False), bool):  # DeepSpeed reads "auto" as false
                problems.append(f"{path}: {key}.enabled must be true or false")
        if not isinstance(config.setdefault("gradient_clipping", 0.0), (int, float)):
            problems.append(f"{path}: gradient_clipping must be a number, not {config['gradient_clipping']!r}")
    if config["zero_optimization"].get("stage") not in (1, 2):
        raise UserError(f"{path}: zero_optimization.stage must be 2 (or 1): only adapters are trained here")
    config["optimizer"].setdefault("type", "AdamW")
    parameters = config["optimizer"].setdefault("params", {})
    if not isinstance(parameters, dict):
        raise UserError(f"{path}: optimizer.params must be an object, as in ds_zero2_no_offload.json")
    parameters.setdefault("torch_adam", True)  # needs no compiler
    config.setdefault("steps_per_print", 10**9)
    return config
