"""LoRA fine-tuning of Baichuan2 on a role's dialogues, with DeepSpeed ZeRO-2.

    CUDA_VISIBLE_DEVICES=0 deepspeed --master_port 5545 train.py --train_path data/train.json --test_path data/test.json \\
        --model_name_or_path Baichuan2-7B-Chat/ --per_device_train_batch_size 2 --max_len 512 --max_src_len 256 \\
        --learning_rate 1e-4 --weight_decay 0.1 --num_train_epochs 1 --gradient_accumulation_steps 4 --warmup_ratio 0.03 \\
        --seed 1234 --show_loss_step 10 --lora_dim 16 --lora_alpha 64 --save_model_step 300 --lora_dropout 0.1 \\
        --output_dir ./output_dir --gradient_checkpointing --ds_file ds_zero2_no_offload.json --is_skip

`python3 train.py …` runs a single process without the launcher. Without a CUDA GPU everything runs on the CPU.
"""

import math
import signal
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from support.command_line import ArgumentParser, Switch, integer, number, with_config
from support.device import row_cost
from support.dialogues.samples import read_samples
from support.errors import Problems, UserError, entry_point, first_line, slow_imports
from support.training.arguments import read_deepspeed_config, refuse_wrong_arguments, tokens_or_auto


def parse_args(argv=None):
    parser = ArgumentParser(description="Fine-tune Baichuan2 with LoRA adapters on prompt/response samples.")
    count, share = integer(1), number(below=1)
    add = parser.add_argument_group("data").add_argument
    add("--train_path", default="data/train.json", help="training samples, from data_helper.py")
    add("--test_path", default="data/test.json", help="samples for the perplexity")
    add("--max_len", type=count, default=512, help="tokens of a sample at most: persona, question, answer")
    add("--max_src_len", type=count, default=256, help="tokens of a question at most; its beginning is kept")
    add("--is_skip", action=Switch, default=False, help="leave samples over a limit out instead of cutting them")
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", default="Baichuan2-7B-Chat/", help="directory of the base model")
    add("--lora_dim", type=count, default=16, help="rank r of the adapters")
    add("--lora_alpha", type=number(positive=True), default=64, help="adapters are scaled by lora_alpha / lora_dim")
    add("--lora_dropout", type=share, default=0.1, help="share of an adapter's inputs set to zero")
    kernels = ["sdpa", "flex_attention", "flash_attention_2", "eager"]
    add("--attn_implementation", default="sdpa", choices=kernels, help="attention kernels to use")
    add("--load_in_4bit", action=Switch, default=False, help="hold the base in 4 bits (QLoRA): a third of its memory")
    add("--gradient_checkpointing", action=Switch, default=False, help="recompute layers: less memory, slower")
    add("--compile", action=Switch, default=False, help="torch.compile the layers; needs g++ (GPU: gcc) and Python.h")
    add = parser.add_argument_group("steps").add_argument
    add("--per_device_train_batch_size", type=count, default=2, help="samples of a process; see the next flag")
    add("--gradient_accumulation_steps", type=count, default=4, help="a step: this × the above × processes samples")
    add("--num_train_epochs", type=count, default=1, help="passes over the training samples")
    add("--learning_rate", type=number(positive=True), default=1e-4, help="highest learning rate")
    add("--warmup_ratio", type=share, default=0.03, help="share of the steps in which it rises from 0")
    add("--weight_decay", type=number(), default=0.1, help="AdamW's decay, per unit of learning rate")
    add("--seed", type=integer(0), default=1234, help="decides initial adapters, order of samples and dropout")
    packing = "tree: rows that hold once what samples share; none: padded rows of per_device_train_batch_size samples"
    add("--packing", default="tree", choices=["tree", "none"], help=packing)
    add("--max_pack_len", type=tokens_or_auto, default="auto", help="tokens of such a row at most; auto: least cost")
    ds_file = str(Path(__file__).with_name("ds_zero2_no_offload.json"))
    add("--ds_file", default=ds_file, help="DeepSpeed configuration; sets precision")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="./output_dir", help="adapters, TensorBoard events, states to resume")
    add("--show_loss_step", type=count, default=10, help="steps between two reports of the loss")
    add("--save_model_step", type=integer(0), default=300, help="steps between two adapters; 0: per epoch only")
    add("--eval_steps", type=integer(0), default=0, help="steps between two perplexities; 0: with each save only")
    add("--save_total_limit", type=count, help="adapters to keep, the newest, besides the best one; default: all")
    add("--patience", type=count, help="stop after this many adapters in a row that are no better; default: never")
    add("--sample_answers", type=integer(0), default=2, help="questions a role (of 20) answered in TensorBoard")
    add("--dry_run", action="store_true", help="say what the run will take, and stop before its first step")
    add("--resume", action="store_true", help="go on from the newest state in --output_dir")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_argument("--config", help="JSON file of flags, such as a run's train_args.json; those on the line win")
    return parser.parse_args(with_config(argv))


# After the arguments, since these take seconds.
with slow_imports(parse_args, __name__):
    import numpy as np
    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    import utils
    from support.model.directory import ModelDirectory
    from support.scores.persona import who_said_it_now
    from support.training import one_parameter, processes
    from support.training.checkpoints import Best
    from support.training.fused_lora import fuse
    from support.training.log import Log
    from support.training.resume import claim, find_state, load_state, run_identity, save_state
    from support.training.run_record import announce, diverged, keep_record
    from support.training.sample_answers import generate_sample_answers, uncompiled
    from support.training.trial import try_largest_rows


# ---------------------------------------------------------------- samples


def read_inputs(args):
    """The model's directory, the DeepSpeed file, training and test data, test samples as they were read. Raises: UserError."""
    directory = ModelDirectory(args.model_name_or_path)
    refuse_wrong_arguments(args, directory)
    tokenizer = directory.tokenizer
    with Problems() as problems:
        train = read_samples(args.train_path)
        train_data = problems.of(read_data, args, tokenizer, args.train_path, train, step_size(args))
        test = problems.of(list, read_samples(args.test_path))
        test_data = None if test is None else problems.of(read_data, args, tokenizer, args.test_path, test, 1)
    return directory, read_deepspeed_config(args.ds_file), train_data, test_data, test


def read_data(args, tokenizer, path: str, samples, needed: int) -> utils.RoleDataset:
    """Samples as token ids, with the counts printed. Raises: UserError where fewer than `needed` fit."""
    samples = tqdm(samples, f"tokenizing {path}", unit=" samples", delay=2, disable=not processes.is_main_process())
    data = utils.RoleDataset(samples, tokenizer, args.max_len, args.max_src_len, args.is_skip)
    if processes.is_main_process():
        print(f"{path}: " + ", ".join(f"{count:,} {name}" for name, count in data.counts.items() if count))
    if len(data) < needed:
        remedy = f"allow more tokens than --max_len {args.max_len} and --max_src_len {args.max_src_len}"
        if data.counts["read"] < needed:  # however many tokens there were
            remedy = "add samples, or lower --per_device_train_batch_size or --gradient_accumulation_steps"
        raise UserError(f"{path}: {len(data)} of {data.counts['read']} samples fit; {needed} are needed: {remedy}")
    return data


def step_size(args) -> int:  # samples of a step, over all processes
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * processes.rank_and_world_size()[1]


def lay_out(args, config, device, train_data, test_data) -> tuple[utils.Steps, list[dict]]:
    """The training steps of this process, and its share of the test rows."""
    rank, world_size = processes.rank_and_world_size()
    layout = (args.packing, args.max_pack_len, args.per_device_train_batch_size, row_cost(config, device))
    collator = utils.Collator(train_data, *layout)
    steps = utils.Steps(train_data, collator, step_size(args), args.num_train_epochs, args.seed, rank, world_size)
    test_rows = utils.Collator(test_data, *layout)(test_data.in_tree_order(np.arange(len(test_data))))
    return steps, test_rows[rank::world_size]


# ---------------------------------------------------------------- model and optimizer


def model_with_adapters(args, directory: ModelDirectory, dtype: torch.dtype, device: torch.device):
    """The frozen base with LoRA (Hu et al. 2021, arXiv 2106.09685) on every linear layer of the decoder.

    LoRA leaves a weight W as it is and learns a small difference beside it: y = W x + (alpha / r) · B A x, with A of
    r rows and B of r columns. B starts at zero, so that training starts from the base's own answers. With --load_in_4bit
    W is held in four bits (support/model/four_bit.py), on `device`.
    """
    from peft import LoraConfig, get_peft_model

    model = directory.load(dtype, args.attn_implementation, device, args.load_in_4bit)
    lora = LoraConfig(
        r=args.lora_dim,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=utils.find_all_linear_names(model),
        task_type="CAUSAL_LM",
    )
    if not args.load_in_4bit:
        fuse(lora)  # the same up to rounding, in fewer operations
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
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


def start_engine(model, config: dict, args, total_steps: int):
    """DeepSpeed around the model, its adapters and the optimizer of the configuration. Raises: UserError."""
    import deepspeed

    def schedule(optimizer):  # LambdaLR counts from 0
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: learning_rate_factor(min(k + 1, total_steps), total_steps, args.warmup_ratio)
        )

    config["optimizer"]["params"].update(lr=args.learning_rate, weight_decay=args.weight_decay)
    # A step's backward passes are summed by hand (their number varies), so to DeepSpeed every step is one micro-batch.
    config["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size * args.gradient_accumulation_steps
    start = {"model": model, "config": config, "lr_scheduler": schedule}
    try:
        return one_parameter.initialize(model, lambda flat: deepspeed.initialize(model_parameters=[flat], **start)[0])
    except (AssertionError, LookupError, TypeError, ValueError) as error:  # it has no class for what it does not take
        raise UserError(f"{args.ds_file}: DeepSpeed refuses the configuration: {first_line(error)}") from error


# ---------------------------------------------------------------- training

# A step as the chapter has it. `train_step` and `update` compute the same, and differ for the reasons on the right.
#
#     for batch in batches:                  # as many rows as the samples need: their gradients are reduced once
#         loss = engine(**batch).loss        # of a row: divided by the tokens of the whole step, each counts the same
#         engine.backward(loss)              # × world_size, since DeepSpeed averages over the processes
#         print(loss.item())                 # waits for the GPU: numbers stay there until all are read together
#     engine.step()                          # its norm and overflow tell whether the run can go on


def train_step(engine, batches, tokens: int, attn_implementation: str, stop: bool) -> torch.Tensor:
    """Add up the gradients of a step's batches. tokens: supervised ones of the whole step, on all processes.

    Returns: (3,) on the device: the loss, how many processes were asked to stop, and room for the gradient's norm.
    """
    numbers = torch.zeros(3, device=engine.device)
    numbers[1] += stop
    with engine.coalesce_grad_reduction():
        for batch in batches:
            inputs = utils.model_inputs(batch, engine.device, attn_implementation)
            loss = engine(**inputs, use_cache=False, num_items_in_batch=tokens).loss
            engine.backward(loss * dist.get_world_size())
            numbers[0] += loss.detach()
        one_parameter.hand_over_gradients(engine)
    dist.all_reduce(numbers)
    return numbers


def update(engine, dtype: torch.dtype, numbers: torch.Tensor) -> tuple[float, bool, float]:
    """Let the optimizer take its step. Returns the loss, whether to stop, and the gradient's norm before clipping.

    `numbers`, those of `train_step`, are read once DeepSpeed's clipping has waited for the device anyway. The norm is nan
    where the run cannot go on from it. In float16 the loss is scaled so that small gradients do not vanish. When large ones
    overflow instead, DeepSpeed leaves the step out and lowers the scale; no error until the scale can fall no further.
    """
    try:
        engine.step()
        if (norm := engine.get_global_grad_norm()) is not None:  # where it is no number, DeepSpeed says -1 or infinite
            numbers[2] = norm
    except Exception as error:  # DeepSpeed's, without a class of its own
        if "loss scale already at minimum" not in str(error):
            raise
        numbers[2] = math.nan
    loss, stop, norm = numbers.tolist()
    can_go_on = 0 <= norm < math.inf or dtype == torch.float16 and engine.optimizer.overflow
    return loss, stop > 0, norm if can_go_on else math.nan


def evaluate(args, engine, test_rows, log: Log, step: int) -> float:
    """The mean loss on the test set after a step, logged with its perplexity. Raises: UserError if it is no number."""
    show_progress = processes.is_main_process()
    test_loss = utils.evaluation(engine.module, test_rows, engine.device, args.attn_implementation, show_progress)
    if not math.isfinite(test_loss):
        raise diverged(args.output_dir, f"{args.test_path}: the loss after step {step} is {test_loss}")
    log.show(step, {"test_loss": test_loss, "ppl": math.exp(min(test_loss, 700))})
    return test_loss


def log_persona(args, engine, directory, log: Log, step: int, test: list[dict]):
    """Log who is heard, which the processes read together, and answers, for which the others wait at the next step."""
    engine.eval()  # neither is drawn with dropout
    limits = (args.max_len, args.max_src_len, args.packing, args.max_pack_len)
    log.show(step, who_said_it_now(test, engine.module, directory.tokenizer, *limits))
    if args.sample_answers and processes.is_main_process():
        with uncompiled(args.compile):
            log.show(step, generate_sample_answers(engine.module, directory, test, args.sample_answers))
    engine.train()


def save_adapter(args, engine, directory, name: str, test_loss: float, best: Best):
    """Save the adapters of this moment as `name`, and let output_dir/best name the best one so far."""
    best.add(name, test_loss)
    if processes.is_main_process():
        path = Path(args.output_dir, name)
        utils.save_model(engine.module, directory.tokenizer, path, directory.fingerprint)
        tqdm.write(f"{path}: perplexity {math.exp(min(test_loss, 700)):.3f} (loss {test_loss:.4f})")
        best.keep(path.parent, args.save_total_limit)


@entry_point
@processes.one_line_for_each_end()
def main(argv=None):
    args = parse_args(argv)

    # 1. What can be wrong is found before anything slow.
    directory, config, train_data, test_data, test = read_inputs(args)

    # 2. The processes meet, and agree on what this run is and from where it goes on.
    device = processes.join_processes()
    rank, world_size = processes.rank_and_world_size()
    output_dir, dtype = Path(args.output_dir), processes.precision(config)
    claim(output_dir, args.dry_run)
    identity = run_identity(args, directory.fingerprint, train_data, test_data, dtype)
    done, state, losses, best = find_state(output_dir, identity)

    # 3. The rows that will be read, the frozen base with its adapters, and DeepSpeed with the optimizer.
    steps, test_rows = lay_out(args, directory.config, device, train_data, test_data)
    torch.manual_seed(args.seed)
    model = model_with_adapters(args, directory, dtype, device)
    engine = start_engine(model, config, args, len(steps))
    if args.sample_answers and rank == 0:
        with uncompiled(args.compile):
            directory.refuse_to_fail_later(model)
    if state:
        load_state(engine, state)

    # 4. What will be trained is said and kept. The largest rows pass, so that a run which does not fit ends here.
    engine.train()  # dropout and checkpointing act in no other mode
    if rank == 0:
        announce(args, engine, steps, done, state, dtype)
        if not args.dry_run:
            keep_record(args)
    if done < len(steps):
        try_largest_rows(args, engine, steps, test_rows, done, dtype)
    if args.dry_run:
        return

    # 5. Train, show, save; stop where one is asked to.
    log = Log(output_dir / "runs", len(steps), done, losses, rank == 0)
    with closing(log), processes.stop_requests() as asked_to_stop:
        for step, (batches, tokens) in enumerate(processes.step_loader(steps, done, device), start=done + 1):
            if best.is_old(args.patience):
                break
            torch.manual_seed(args.seed * 1_000_003 + step * world_size + rank)  # dropout; nothing to keep for a resume
            numbers = train_step(engine, batches, tokens, args.attn_implementation, stop=bool(asked_to_stop()))
            (learning_rate,) = engine.get_lr()
            loss, stop, grad_norm = update(engine, dtype, numbers)
            if not math.isfinite(loss) or math.isnan(grad_norm):
                samples = ", ".join(map(str, train_data.numbers[steps.samples(step - 1)]))
                what = f"the loss of step {step} is {loss}, its gradient's norm {grad_norm}, with samples {samples}"
                raise diverged(output_dir, f"{args.train_path}: {what}; look at them")
            log.add(loss, steps.step_size, sum(batch["input_ids"].numel() for batch in batches) * world_size)
            if step % args.show_loss_step == 0:
                log.report(step, learning_rate, grad_norm)
            save = step % steps.steps_per_epoch == 0 or step % (args.save_model_step or len(steps)) == 0
            if save or step % (args.eval_steps or len(steps)) == 0:
                test_loss = evaluate(args, engine, test_rows, log, step)
            if save:
                save_adapter(args, engine, directory, steps.name(step), test_loss, best)
            if save or stop:
                now = {"identity": identity, "losses": log.losses, "best": asdict(best)}
                save_state(engine, output_dir / "state" / steps.name(step), now)
            if save and not stop:
                log_persona(args, engine, directory, log, step, test)
            if stop and step < len(steps):
                if rank == 0:
                    print(f"\nstopped after step {step} of {len(steps)}; the same command with --resume goes on there")
                raise SystemExit(128 + (asked_to_stop() or signal.SIGTERM))
    if rank == 0 and best.name:
        print(best.report(output_dir, args.patience))


if __name__ == "__main__":
    main()
