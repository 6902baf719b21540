"""LoRA fine-tuning of Baichuan2 on a role's dialogues, with DeepSpeed ZeRO-2.

    CUDA_VISIBLE_DEVICES=0 deepspeed --master_port 5545 train.py --train_path data/train.json --test_path data/test.json \\
        --model_name_or_path Baichuan2-7B-Chat/ --per_device_train_batch_size 2 --max_len 512 --max_src_len 256 \\
        --learning_rate 1e-4 --weight_decay 0.1 --num_train_epochs 1 --gradient_accumulation_steps 4 --warmup_ratio 0.03 \\
        --seed 1234 --show_loss_step 10 --lora_dim 16 --lora_alpha 64 --save_model_step 300 --lora_dropout 0.1 \\
        --output_dir ./output_dir --gradient_checkpointing --ds_file ds_zero2_no_offload.json --is_skip

`python3 train.py …` runs a single process without the launcher. Without a CUDA GPU everything runs on the CPU.
"""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from baichuan import loading, processes, script
from baichuan.checks import deepspeed_config, refuse_wrong_arguments
from baichuan.processes import join_processes
from baichuan.script import UserError
from baichuan.states import claim, digest, load_state, model_digest, newest_state, read_run, save_state
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
    output.add_argument(
        "--sample_answers",
        type=int,
        default=2,
        help="test questions a role whose answers TensorBoard shows, at each save",
    )
    output.add_argument("--resume", action="store_true", help="go on from the newest state in --output_dir")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    return parser.parse_args(argv)


ATTENTIONS = ["sdpa", "flex_attention", "flash_attention_2", "eager"]


# ---------------------------------------------------------------- samples


def read_data(args, tokenizer, generation_config, world_size: int, main_process: bool):
    """Both files as datasets, with the counts printed. Raises: UserError for all that would leave nothing to train."""
    datasets, problems = [], []
    for path in (args.train_path, args.test_path):
        try:
            samples = tqdm(read_samples(path), f"tokenizing {path}", unit=" samples", delay=2, disable=not main_process)
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


def run_identity(args, train_data, world_size: int) -> dict:
    """What decides the result of a run to the last bit, except for what only decides its speed."""
    flags = ("num_train_epochs", "learning_rate", "weight_decay", "warmup_ratio", "seed")
    flags += ("lora_dim", "lora_alpha", "lora_dropout", "gradient_accumulation_steps", "per_device_train_batch_size")
    return {
        "training data": digest(train_data.ids, train_data.persona, train_data.starts, str(train_data.personas)),
        "base model": model_digest(args.model_name_or_path),
        "processes": world_size,
        "DeepSpeed configuration": digest(json.dumps(json.loads(Path(args.ds_file).read_text()), sort_keys=True)),
        **{f"--{name}": getattr(args, name) for name in flags},
    }


def step_size(args, world_size: int) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size


# ---------------------------------------------------------------- model and optimizer


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
    """DeepSpeed around the model, its adapters and the optimizer of the configuration. Raises: UserError."""
    import deepspeed

    def schedule(optimizer):  # LambdaLR counts from 0
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: learning_rate_factor(min(k + 1, total_steps), total_steps, warmup_ratio)
        )

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config, lr_scheduler=schedule)
    # It has no class for its own errors.
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"--ds_file: DeepSpeed refuses the configuration: {script.first_line(error)}") from error
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


def update(engine, dtype: torch.dtype) -> float:
    """Let the optimizer take its step; the gradient's norm before clipping, nan where the run cannot go on from it.

    In float16 the loss is scaled so that small gradients do not vanish. When large ones overflow instead, DeepSpeed
    leaves the step out and lowers the scale; that is no error until the scale can fall no further.
    """
    try:
        engine.step()
    except Exception as error:  # DeepSpeed's, without a class of its own
        if "loss scale already at minimum" not in str(error):
            raise
        return math.nan
    norm = float(engine.get_global_grad_norm() or 0.0)  # where it is no number, DeepSpeed says -1 or infinite
    handled = dtype == torch.float16 and engine.optimizer.overflow
    return norm if handled or 0 <= norm < math.inf else math.nan


def sample_answers(model, tokenizer, generation_config, test_path: str, per_role: int) -> dict[str, str]:
    """Greedy answers to the first test questions of each role, as Markdown: one sees the persona arrive."""
    from predict import answer_batch, conversation, greedy  # here, since it needs more than training does

    questions: dict[str, dict[str, dict]] = {}
    for sample in read_samples(test_path):
        asked = questions.setdefault(sample["role"], {})
        if len(asked) < per_role:
            asked[sample["prompt"]] = conversation(sample["system"], sample["prompt"])
    model.eval()
    texts = {}
    for role, asked in questions.items():
        answers = answer_batch(model, tokenizer, list(asked.values()), greedy(generation_config, 128))
        texts[f"answers/{role}"] = "\n\n".join(f"**{q}**  \n{answer.text}" for q, answer in zip(asked, answers))
    model.train()
    return texts


@script.entry_point
@processes.one_line_for_each_end()
def main(argv=None):
    args = parse_args(argv)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    main_process = rank == 0
    output_dir = Path(args.output_dir)

    # 1. Find out all that is wrong before anything slow.
    refuse_wrong_arguments(args)
    config = deepspeed_config(args)
    tokenizer, generation_config = loading.load_tokenizer(args.model_name_or_path)
    train_data, test_data = read_data(args, tokenizer, generation_config, world_size, main_process)
    identity = run_identity(args, train_data, world_size)
    first, state = newest_state(output_dir)

    # 2. Processes, model, optimizer.
    device = join_processes()
    dtype = processes.precision(config, main_process)  # the device's, which may be another one than before
    identity["precision"] = str(dtype)
    processes.refuse_differences(identity | {"the state in --output_dir": first})
    run = read_run(state, identity) if state else {"identity": identity, "losses": []}
    torch.manual_seed(args.seed)
    model = model_with_adapters(args, dtype)
    how = (args.packing, args.max_pack_len, args.per_device_train_batch_size)
    collator = utils.Collator(train_data, *how)
    steps = utils.Steps(
        train_data, collator, step_size(args, world_size), args.num_train_epochs, args.seed, rank, world_size
    )
    test_rows = utils.Collator(test_data, *how)(test_data.by_persona(np.arange(len(test_data))))[rank::world_size]
    engine = start_engine(model, config, len(steps), args.warmup_ratio)
    if args.sample_answers and main_process:
        loading.refuse_to_fail_later(args.model_name_or_path, model, tokenizer, generation_config)
    if state:
        load_state(engine, state)
    claim(output_dir)
    if main_process:
        with script.whole_files(output_dir / "train_args.json") as (file,):
            json.dump(vars(args), file, ensure_ascii=False, indent=2)
        model.print_trainable_parameters()
        print(
            f"{len(steps):,} steps of {steps.step_size} samples, {steps.steps_per_epoch:,} an epoch; "
            f"{str(dtype).removeprefix('torch.')} on {world_size} × {device.type}; to {output_dir}"
        )
        if args.resume:
            print(f"going on from {state}" if state else f"{output_dir}: no state is saved there yet; starting anew")
        if first == len(steps):
            print(f"{output_dir}: is complete, nothing is left to do")

    # 3. Train.
    def broken(what: str) -> UserError:
        numbers = ", ".join(map(str, train_data.numbers[steps.samples(step - 1)]))
        return UserError(
            f"{args.train_path}: {what}, with samples {numbers}; look at them, lower --learning_rate or train in "
            f"another precision. {newest_state(output_dir)[1] or 'No state'} is the last one saved"
        )

    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, len(steps)),
        num_workers=1,
        prefetch_factor=4,
        pin_memory=device.type == "cuda",
        worker_init_fn=processes.leave_signals_to_parent,
    )
    log = utils.Log(output_dir / "runs", len(steps), first, run["losses"], main_process)
    with log, processes.StopRequest() as stop_request:
        for step, (batches, tokens) in enumerate(loader, start=first + 1):
            torch.manual_seed(args.seed * 1_000_003 + step * world_size + rank)  # dropout; nothing to keep for a resume
            loss, stop = train_step(
                engine, batches, tokens, world_size, args.attn_implementation, stop=bool(stop_request)
            )
            if not math.isfinite(loss):
                raise broken(f"the loss of step {step} is {loss}")
            learning_rate = engine.get_lr()[0]
            grad_norm = update(engine, dtype)
            if math.isnan(grad_norm):
                raise broken(f"the gradient of step {step} is not finite")
            log.add(loss, steps.step_size, sum(batch["input_ids"].numel() for batch in batches) * world_size)
            if step % args.show_loss_step == 0:
                log.show(step, learning_rate, grad_norm)

            name = f"epoch-{(step - 1) // steps.steps_per_epoch + 1}-step-{step}"
            save = step % steps.steps_per_epoch == 0 or (args.save_model_step and step % args.save_model_step == 0)
            if save:
                test_loss = utils.evaluate(engine.module, test_rows, device, args.attn_implementation, main_process)
                if not math.isfinite(test_loss):
                    raise broken(f"the loss on {args.test_path} after step {step} is {test_loss}")
            if save and main_process:
                perplexity = math.exp(min(test_loss, 700))
                log.scalars(step, {"test_loss": test_loss, "ppl": perplexity})
                if args.sample_answers:
                    how = (tokenizer, generation_config, args.test_path, args.sample_answers)
                    log.texts(step, sample_answers(model, *how))
                utils.save_adapter(model, tokenizer, output_dir / name, args.save_total_limit)
                tqdm.write(f"{output_dir / name}: perplexity {perplexity:.3f} (loss {test_loss:.4f})")
            if save or stop:
                save_state(engine, output_dir / "state" / name, run | {"losses": log.losses})
            if stop and step < len(steps):
                if main_process:
                    print(f"\nstopped after step {step} of {len(steps)}; the same command with --resume goes on there")
                raise SystemExit(128 + (stop_request.signal or signal.SIGTERM))


if __name__ == "__main__":
    main()
