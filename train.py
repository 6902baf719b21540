"""LoRA fine-tuning of Baichuan2 on a role's dialogues, with DeepSpeed ZeRO-2.

    CUDA_VISIBLE_DEVICES=0 deepspeed --master_port 5545 train.py --train_path data/train.json --test_path data/test.json \\
        --model_name_or_path Baichuan2-7B-Chat/ --per_device_train_batch_size 2 --max_len 512 --max_src_len 256 \\
        --learning_rate 1e-4 --weight_decay 0.1 --num_train_epochs 1 --gradient_accumulation_steps 4 --warmup_ratio 0.03 \\
        --seed 1234 --show_loss_step 10 --lora_dim 16 --lora_alpha 64 --save_model_step 300 --lora_dropout 0.1 \\
        --output_dir ./output_dir --gradient_checkpointing --ds_file ds_zero2_no_offload.json --is_skip

`python3 train.py …` runs a single process without the launcher. Without a CUDA GPU everything runs on the CPU.
"""

import atexit
import json
import math
import os
import signal
import socket
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from baichuan import loading, script
from baichuan.script import UserError
from data_helper import read_samples

MODEL_FILES = "config.json, generation_config.json, tokenizer.model and the weights"


def parse_args(argv=None):
    parser = script.ArgumentParser(description="Fine-tune Baichuan2 with LoRA adapters on prompt/response samples.")
    data = parser.add_argument_group("data")
    data.add_argument("--train_path", default="data/train.json", help="training samples, from data_helper.py")
    data.add_argument("--test_path", default="data/test.json", help="samples for the perplexity")
    data.add_argument("--max_len", type=int, default=512, help="tokens of a sample at most: persona, question, answer")
    data.add_argument(
        "--max_src_len", type=int, default=256, help="tokens of a question at most; its beginning is kept"
    )
    data.add_argument("--is_skip", action="store_true", help="leave samples over a limit out instead of cutting them")
    model = parser.add_argument_group("model")
    model.add_argument("--model_name_or_path", default="Baichuan2-7B-Chat/", help=f"directory with {MODEL_FILES}")
    model.add_argument("--lora_dim", type=int, default=16, help="rank r of the adapters")
    model.add_argument("--lora_alpha", type=float, default=64, help="adapters are scaled by lora_alpha / lora_dim")
    model.add_argument("--lora_dropout", type=float, default=0.1, help="share of an adapter's inputs set to zero")
    model.add_argument("--attn_implementation", default="sdpa", choices=ATTENTIONS, help="attention kernels to use")
    model.add_argument("--gradient_checkpointing", action="store_true", help="recompute layers: less memory, slower")
    model.add_argument("--compile", action="store_true", help="torch.compile the decoder layers; needs a compiler")
    steps = parser.add_argument_group("steps")
    steps.add_argument("--per_device_train_batch_size", type=int, default=2, help="samples; see the next flag")
    steps.add_argument(
        "--gradient_accumulation_steps",
        type=int,
        default=4,
        help="a step takes this × per_device_train_batch_size × processes samples",
    )
    steps.add_argument("--num_train_epochs", type=int, default=1, help="passes over the training samples")
    steps.add_argument("--learning_rate", type=float, default=1e-4, help="highest learning rate")
    steps.add_argument("--warmup_ratio", type=float, default=0.03, help="share of the steps in which it rises from 0")
    steps.add_argument("--weight_decay", type=float, default=0.1, help="AdamW's decay, per unit of learning rate")
    steps.add_argument("--seed", type=int, default=1234, help="decides initial adapters, order of samples and dropout")
    steps.add_argument(
        "--packing",
        default="prefix",
        choices=["prefix", "none"],
        help="prefix: rows that hold each persona once; none: padded rows of per_device_train_batch_size samples",
    )
    steps.add_argument("--max_pack_len", type=int, default=1024, help="tokens of a prefix row at most")
    steps.add_argument("--ds_file", default="ds_zero2_no_offload.json", help="DeepSpeed configuration; sets precision")
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default="./output_dir", help="adapters, TensorBoard events, states to resume")
    output.add_argument("--show_loss_step", type=int, default=10, help="steps between two reports of the loss")
    output.add_argument(
        "--save_model_step", type=int, default=300, help="steps between two adapters; 0: per epoch only"
    )
    output.add_argument("--save_total_limit", type=int, help="adapters to keep, the newest ones; default: all")
    output.add_argument("--resume", action="store_true", help="go on from the newest state in --output_dir")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    return parser.parse_args(argv)


ATTENTIONS = ["sdpa", "flex_attention", "flash_attention_2", "eager"]


# ---------------------------------------------------------------- what can be wrong, found out first


def argument_problems(args) -> list[str]:
    problems = []
    for name in (
        *("max_len", "max_src_len", "lora_dim", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("num_train_epochs", "show_loss_step", "max_pack_len"),
    ):
        if getattr(args, name) < 1:
            problems.append(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("learning_rate", "lora_alpha"):
        if not 0 < getattr(args, name) < math.inf:
            problems.append(f"--{name} must be positive, not {getattr(args, name)}")
    for name in ("save_model_step", "seed"):
        if not 0 <= getattr(args, name) < 2**32:
            problems.append(f"--{name} must be from 0 to 2³²−1, not {getattr(args, name)}")
    if args.save_total_limit is not None and args.save_total_limit < 1:
        problems.append(f"--save_total_limit must be at least 1, not {args.save_total_limit}")
    if not args.resume and (newest_state(args) or utils.checkpoints(args.output_dir)):
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


def newest_state(args) -> Path | None:
    states = utils.checkpoints(Path(args.output_dir) / "state")
    return states[-1][1] if states else None


def identity_problems(state: Path, identity: dict) -> list[str]:
    """Where the run that saved a state is not the one that would go on from it."""
    saved = json.loads((state / "run.json").read_text(encoding="utf-8"))
    return [
        f"{state}: was saved with {name} {saved.get(name)}, not {identity[name]}: change that back, or start in another "
        "--output_dir"
        for name in identity
        if saved.get(name) != identity[name]
    ]


def deepspeed_config(args) -> dict:
    """The DeepSpeed file with the values that the flags decide. Raises: UserError."""
    try:
        config = json.loads(Path(args.ds_file).read_text(encoding="utf-8"))
    except ValueError as error:
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
    if "type" not in sections["optimizer"]:
        problems.append(f'{args.ds_file}: optimizer.type is missing; "AdamW" with "torch_adam": true needs no compiler')
    if problems:
        raise UserError(*problems)
    config["optimizer"].setdefault("params", {}).update(lr=args.learning_rate, weight_decay=args.weight_decay)
    # A step's backward passes are summed by hand (their number varies), so to DeepSpeed every step is one micro-batch.
    config["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size * args.gradient_accumulation_steps
    config["gradient_accumulation_steps"] = 1
    config.setdefault("steps_per_print", 10**9)
    return config


def read_data(args, tokenizer, generation_config, world_size: int, main_process: bool):
    """Both files as datasets, with the counts printed. Raises: UserError for all that would leave nothing to train."""
    datasets, problems = [], []
    for path in (args.train_path, args.test_path):
        try:
            samples = tqdm(read_samples(path), f"tokenizing {path}", unit=" samples", disable=not main_process)
            data = utils.RoleDataset(
                samples, tokenizer, generation_config, args.max_len, args.max_src_len, args.is_skip
            )
        except UserError as error:
            problems += error.problems
            continue
        if main_process:
            print(f"{path}: " + ", ".join(f"{count:,} {name}" for name, count in data.counts.items() if count))
        datasets.append(data)
        needed = step_size(args, world_size) if path == args.train_path else 1
        if len(data) < needed:
            problems.append(
                f"{path}: {len(data)} of {data.counts['read']} samples fit into --max_len {args.max_len} and "
                f"--max_src_len {args.max_src_len}; {needed} are needed: allow more tokens"
                + (", take fewer samples a step" if data.counts["read"] else "")
            )
    if problems:
        raise UserError(*problems)
    return datasets


def run_identity(args, config: dict, train_data, world_size: int) -> dict:
    """What decides the result of a run to the last bit, except for what only decides its speed."""
    flags = ("num_train_epochs", "learning_rate", "weight_decay", "warmup_ratio", "seed")
    flags += ("lora_dim", "lora_alpha", "lora_dropout", "gradient_accumulation_steps", "per_device_train_batch_size")
    return {
        "training data": utils.digest(train_data.ids, train_data.persona, train_data.starts, str(train_data.personas)),
        "base model": utils.model_digest(args.model_name_or_path),
        "processes": world_size,
        "DeepSpeed configuration": utils.digest(json.dumps(config, sort_keys=True)),
        **{f"--{name}": getattr(args, name) for name in flags},
    }


def step_size(args, world_size: int) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size


# ---------------------------------------------------------------- processes, precision, model


def join_processes() -> torch.device:
    """Meet the other processes of the launcher, or be a group of one; returns this process's device."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed  # here, so that --help and wrong arguments need not wait for it

    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
    # On the CPU DeepSpeed would first compile an all-reduce of its own, for most of a minute; gloo has one.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = deepspeed.get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    if not dist.is_initialized():
        deepspeed.init_distributed(verbose=False)
        atexit.register(dist.destroy_process_group)
    return torch.device(accelerator.device_name(local_rank) if accelerator.device_name() != "cpu" else "cpu")


def precision(config: dict, main_process: bool) -> torch.dtype:
    """The dtype of base and adapters that the DeepSpeed configuration asks for, as far as the device knows it."""
    from deepspeed import get_accelerator

    if config.get("bf16", {}).get("enabled") and not get_accelerator().is_bf16_supported():
        config["bf16"]["enabled"] = False
        config["fp16"] = {"enabled": get_accelerator().is_fp16_supported()}
        if main_process:
            print("this device has no bfloat16; training in", "float16" if config["fp16"]["enabled"] else "float32")
    if config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    return torch.float16 if config.get("fp16", {}).get("enabled") else torch.float32


def model_with_adapters(args, dtype: torch.dtype):
    """The frozen base with LoRA (Hu et al. 2021, arXiv 2106.09685) on every linear layer of the decoder.

    LoRA leaves a weight W as it is and learns a small difference beside it: y = W x + (alpha / r) · B A x, with A of
    r rows and B of r columns. B starts at zero, so that training starts from the base's own answers.
    """
    from peft import LoraConfig, get_peft_model

    model = loading.load_model(args.model_name_or_path, dtype, args.attn_implementation)
    lora = LoraConfig(
        r=args.lora_dim,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=utils.lora_targets(model),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.compile:
        for layer in model.get_base_model().model.layers:
            layer.compile(dynamic=True)
    return model


def learning_rate_factor(step: int, total: int, warmup_ratio: float) -> float:
    """Share of --learning_rate at step k = 1 … total: a linear rise, then half a cosine down to a tenth."""
    warmup = max(1, round(warmup_ratio * total))
    if step <= warmup:
        return step / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def start_engine(model, config: dict, total_steps: int, warmup_ratio: float):
    import deepspeed

    def schedule(optimizer):  # LambdaLR counts from 0
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: learning_rate_factor(min(k + 1, total_steps), total_steps, warmup_ratio)
        )

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config, lr_scheduler=schedule)
    return engine


# ---------------------------------------------------------------- training


def train_step(engine, batches, tokens: int, world_size: int, attn_implementation: str, stop: bool):
    """Add up the gradients of a step's batches; (its loss: the mean over `tokens`, any process's `stop`).

    Every process divides by the tokens of the whole step, so the loss does not depend on how samples are spread over
    rows and processes. DeepSpeed averages gradients over processes, hence the factor world_size.
    """
    total = torch.tensor([0.0, float(stop)], device=engine.device)
    with engine.coalesce_grad_reduction():  # one reduction a step, however many rows each process has
        for batch in batches:
            inputs = utils.model_inputs(batch, engine.device, attn_implementation)
            loss = engine(**inputs, use_cache=False, num_items_in_batch=tokens).loss
            engine.backward(loss * world_size)
            total[0] += loss.detach()
    dist.all_reduce(total)
    loss, stop = total.tolist()
    return loss, stop > 0


@script.entry_point
def main(argv=None):
    args = parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # between the libraries; nothing a user could act on
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    main_process = rank == 0

    # 1. Find out all that is wrong before anything slow.
    problems = argument_problems(args)
    problems += loading.model_directory_problems(args.model_name_or_path)
    problems += [f"{path}: there is no such file" for path in args_files(args) if not Path(path).is_file()]
    config = {}
    try:
        config = deepspeed_config(args)
    except UserError as error:
        problems += error.problems
    except OSError:
        pass  # named above
    if problems:
        raise UserError(*problems)
    tokenizer, generation_config = loading.load_tokenizer(args.model_name_or_path)
    train_data, test_data = read_data(args, tokenizer, generation_config, world_size, main_process)
    identity = run_identity(args, config, train_data, world_size)
    state = newest_state(args)
    if state and (problems := identity_problems(state, identity)):
        raise UserError(*problems)

    # 2. Processes, model, optimizer.
    device = join_processes()
    dtype = precision(config, main_process)
    torch.manual_seed(args.seed)
    model = model_with_adapters(args, dtype)
    how = (args.packing, args.max_pack_len, args.per_device_train_batch_size, device.type == "cuda")
    collator = utils.Collator(train_data, *how)
    steps = utils.Steps(
        train_data, collator, step_size(args, world_size), args.num_train_epochs, args.seed, rank, world_size
    )
    test_rows = utils.Collator(test_data, *how)(test_data.by_persona(np.arange(len(test_data))))[rank::world_size]
    engine = start_engine(model, config, len(steps), args.warmup_ratio)
    output_dir = Path(args.output_dir)
    if main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        with script.whole_files(output_dir / "train_args.json") as (file,):
            json.dump(vars(args), file, ensure_ascii=False, indent=2)
        model.print_trainable_parameters()
        print(
            f"{len(steps):,} steps of {steps.step_size} samples, {steps.steps_per_epoch:,} an epoch; "
            f"{str(dtype).removeprefix('torch.')} on {world_size} × {device.type}; to {args.output_dir}"
        )
        if args.resume:
            print(
                f"going on from {state}" if state else f"{args.output_dir}: no state is saved there yet; starting anew"
            )

    # 3. Train.
    first = 0
    if state:
        engine.load_checkpoint(str(state.parent), tag=state.name, load_module_strict=False)
        first = utils.checkpoints(state.parent)[-1][0]
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, len(steps)),
        num_workers=1,
        prefetch_factor=4,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_parent,
    )
    log = utils.Log(output_dir / "runs", len(steps), first, main_process)
    for step, (batches, tokens) in enumerate(loader, start=first + 1):
        torch.manual_seed(args.seed * 1_000_003 + step * world_size + rank)  # dropout; nothing to keep for a resume
        loss, stop = train_step(engine, batches, tokens, world_size, args.attn_implementation, bool(signals))
        if not math.isfinite(loss):
            numbers = ", ".join(map(str, train_data.numbers[steps.samples(step - 1)]))
            raise UserError(
                f"{args.train_path}: the loss of step {step} is {loss}, with samples {numbers}; look at them, lower "
                f"--learning_rate or train in another precision. {newest_state(args) or 'No state'} is the last one saved"
            )
        learning_rate = engine.get_lr()[0]
        engine.step()
        log.add(loss, steps.step_size, sum(batch["input_ids"].numel() for batch in batches) * world_size)
        if step % args.show_loss_step == 0:
            log.show(step, learning_rate, float(engine.get_global_grad_norm() or 0.0))

        name = f"epoch-{(step - 1) // steps.steps_per_epoch + 1}-step-{step}"
        if step % steps.steps_per_epoch == 0 or (args.save_model_step and step % args.save_model_step == 0):
            test_loss = utils.evaluate(engine.module, test_rows, device, args.attn_implementation, main_process)
            if main_process:
                perplexity = math.exp(min(test_loss, 700))
                log.scalars(step, {"test_loss": test_loss, "ppl": perplexity})
                utils.save_adapter(model, tokenizer, output_dir / name, args.save_total_limit)
                tqdm.write(f"{output_dir / name}: perplexity {perplexity:.3f} (loss {test_loss:.4f})")
            utils.save_state(engine, output_dir / "state" / name, identity, main_process)
        elif stop:
            utils.save_state(engine, output_dir / "state" / name, identity, main_process)
        if stop and step < len(steps):
            if main_process:
                print(f"\nstopped after step {step} of {len(steps)}; the same command with --resume goes on from there")
            raise SystemExit(128 + (signals[0] if signals else signal.SIGTERM))


def leave_signals_to_parent(worker_id: int):
    """Ctrl-C reaches every process of the terminal; the one that trains decides what becomes of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def args_files(args) -> tuple[str, ...]:
    return args.train_path, args.test_path, args.ds_file


if __name__ == "__main__":
    main()
