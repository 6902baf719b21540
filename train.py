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
import socket
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import utils
from baichuan import loading
from data_helper import read_samples
from utils import UserError

MODEL_FILES = "config.json, generation_config.json, tokenizer.model and the weights"


def parse_args(argv=None):
    parser = utils.ArgumentParser(description="Fine-tune Baichuan2 with LoRA adapters on prompt/response samples.")
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
    steps.add_argument("--max_pack_len", type=int, default=2048, help="tokens of a prefix row at most")
    steps.add_argument("--ds_file", default="ds_zero2_no_offload.json", help="DeepSpeed configuration; sets precision")
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default="./output_dir", help="adapters, TensorBoard events, states to resume")
    output.add_argument("--show_loss_step", type=int, default=10, help="steps between two reports of the loss")
    output.add_argument(
        "--save_model_step", type=int, default=300, help="steps between two adapters; 0: per epoch only"
    )
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
        if getattr(args, name) < 0:
            problems.append(f"--{name} must not be negative, as {getattr(args, name)} is")
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


def train_step(engine, batches, tokens: int, world_size: int, attn_implementation: str) -> float:
    """Add up the gradients of a step's batches and return its loss: the mean over `tokens`, on all processes.

    Every process divides by the tokens of the whole step, so the loss does not depend on how samples are spread over
    rows and processes. DeepSpeed averages gradients over processes, hence the factor world_size.
    """
    total = torch.zeros((), device=engine.device)
    with engine.coalesce_grad_reduction():  # one reduction a step, however many rows each process has
        for batch in batches:
            inputs = utils.model_inputs(batch, engine.device, attn_implementation)
            loss = engine(**inputs, use_cache=False, num_items_in_batch=tokens).loss
            engine.backward(loss * world_size)
            total += loss.detach()
    dist.all_reduce(total)
    return total.item()


class Log:
    """TensorBoard events and the progress bar, on the main process; elsewhere it does nothing."""

    def __init__(self, args, total_steps: int, first_step: int, main_process: bool):
        self.writer = SummaryWriter(Path(args.output_dir) / "runs", purge_step=first_step) if main_process else None
        self.bar = tqdm(desc="training", total=total_steps, initial=first_step, unit="step", disable=not main_process)
        self.reset()

    def reset(self):
        self.losses, self.samples, self.tokens, self.start = [], 0, 0, time.perf_counter()

    def add(self, loss: float, samples: int, tokens: int):
        self.bar.update()
        self.losses.append(loss)
        self.samples += samples
        self.tokens += tokens

    def show(self, step: int, learning_rate: float, grad_norm: float):
        """Means since the last call; grad_norm is the one before clipping."""
        seconds = time.perf_counter() - self.start
        loss = sum(self.losses) / len(self.losses)
        rates = {"samples_per_second": self.samples / seconds, "tokens_per_second": self.tokens / seconds}
        self.scalars(step, {"train_loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm, **rates})
        self.bar.set_postfix(loss=f"{loss:.3f}", samples_s=f"{rates['samples_per_second']:.1f}")
        self.reset()

    def scalars(self, step: int, values: dict[str, float]):
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()


def save_adapter(model, tokenizer, directory: Path):
    """A plain PEFT adapter, with the tokenizer it was trained under."""
    with utils.whole_directory(directory, overwrite=True) as new:
        model.save_pretrained(new, save_embedding_layers=False)
        tokenizer.save_pretrained(new)


@utils.entry_point
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

    # 2. Processes, model, optimizer.
    device = join_processes()
    dtype = precision(config, main_process)
    torch.manual_seed(args.seed)
    model = model_with_adapters(args, dtype)
    collator = utils.Collator(train_data, args.packing, args.max_pack_len, args.per_device_train_batch_size)
    steps = utils.Steps(
        train_data, collator, step_size(args, world_size), args.num_train_epochs, args.seed, rank, world_size
    )
    test_rows = utils.Collator(test_data, args.packing, args.max_pack_len, args.per_device_train_batch_size)(
        test_data.by_persona(np.arange(len(test_data)))
    )[rank::world_size]
    engine = start_engine(model, config, len(steps), args.warmup_ratio)
    output_dir = Path(args.output_dir)
    if main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        with utils.whole_files(output_dir / "train_args.json") as (file,):
            json.dump(vars(args), file, ensure_ascii=False, indent=2)
        model.print_trainable_parameters()
        print(
            f"{len(steps):,} steps of {steps.step_size} samples, {steps.steps_per_epoch:,} an epoch; "
            f"{str(dtype).removeprefix('torch.')} on {world_size} × {device.type}; to {args.output_dir}"
        )

    # 3. Train.
    loader = DataLoader(steps, batch_size=None, num_workers=1, prefetch_factor=4, pin_memory=device.type == "cuda")
    log = Log(args, len(steps), 0, main_process)
    for step, (batches, tokens) in enumerate(loader, start=1):
        torch.manual_seed(args.seed * 1_000_003 + step * world_size + rank)  # dropout; nothing to keep for a resume
        loss = train_step(engine, batches, tokens, world_size, args.attn_implementation)
        learning_rate = engine.get_lr()[0]
        engine.step()
        log.add(loss, steps.step_size, sum(batch["input_ids"].numel() for batch in batches) * world_size)
        if step % args.show_loss_step == 0:
            log.show(step, learning_rate, float(engine.get_global_grad_norm() or 0.0))

        epoch_ends = step % steps.steps_per_epoch == 0
        if epoch_ends or (args.save_model_step and step % args.save_model_step == 0):
            test_loss = utils.evaluate(engine.module, test_rows, device, args.attn_implementation, main_process)
            epoch = (step - 1) // steps.steps_per_epoch + 1
            directory = output_dir / f"epoch-{epoch}-step-{step}"
            if main_process:
                log.scalars(step, {"test_loss": test_loss, "ppl": math.exp(min(test_loss, 700))})
                save_adapter(model, tokenizer, directory)
                tqdm.write(f"{directory}: perplexity {math.exp(min(test_loss, 700)):.3f} (loss {test_loss:.4f})")


def args_files(args) -> tuple[str, ...]:
    return args.train_path, args.test_path, args.ds_file


if __name__ == "__main__":
    main()
