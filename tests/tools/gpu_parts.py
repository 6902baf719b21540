"""The parts of gpu_check.py that compute, each in a process of its own: numbers by name, and under "text" what to show.

Raises, all of them: UserError where a result is wrong.
"""

import gc
import shutil
import statistics
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch

import merge_params
import utils
from baichuan.generation_utils import messages_to_ids
from support.device import pick_device
from support.dialogues.samples import read_samples
from support.errors import UserError
from support.model.answering import greedy
from support.model.directory import ModelDirectory
from support.model.weights import write_weights
from support.page.speaker import Speaker
from support.training.checkpoints import checkpoints
from support.training.log import peak_memory_gb
from support.training.processes import has_bfloat16
from tests.tools import bench_predict, bench_train, memory_table, shared
from tests.tools.steps import OwnSteps, training_step

STEP_SIZE = 8  # samples, the chapter's 2 × 4
TOKENS = 64  # of an answer


def base(args) -> Path:
    return args.scratch / "model"


def samples(args) -> tuple[Path, Path]:
    return args.scratch / "train.json", args.scratch / "test.json"


def book_flags(args, run: Path) -> list[str]:
    """What is not here is the chapter's by default."""
    train_path, test_path = samples(args)
    flags = {"--train_path": train_path, "--test_path": test_path, "--model_name_or_path": base(args)}
    flags |= {"--output_dir": run, "--ds_file": shared.ROOT / "ds_zero2_no_offload.json"}
    flags |= {"--show_loss_step": 1, "--save_model_step": args.steps // 2, "--sample_answers": 0}
    return ["--is_skip", *(str(part) for pair in flags.items() for part in pair)]


# ---------------------------------------------------------------- the card and the model


def card(args) -> dict:
    device = pick_device("auto")
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32  # as the training takes it
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    source = torch.randn((2**32 if device.type == "cuda" else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    seconds = shared.median_seconds("target.copy_(source)", target=target, source=source)
    copied = 2 * source.nbytes / seconds  # bytes read and written, a second
    rate = shared.matmul_rate(device, dtype)
    text = f"{name}, torch {torch.__version__}: {rate / 1e12:.3g} TFLOP/s in a product in {str(dtype)[6:]}"
    return {"text": f"{text}, {copied / 1e12:.2g} TB/s in a copy", "matmul": rate}


def weights(args) -> dict:
    """Random weights, written as a model directory; of the data as many samples as the steps take, all within limits."""
    given = ModelDirectory(args.tokenizer or shared.write_model(args.scratch / "stand-in"))
    model = shared.random_model(args.size, torch.bfloat16, pick_device("auto"), len(given.tokenizer))
    shutil.rmtree(base(args), ignore_errors=True)
    base(args).mkdir(parents=True)
    model.config.dtype = torch.bfloat16
    merge_params.save_baichuan(base(args), model.config, given.tokenizer)
    shutil.copy(given.path / "generation_config.json", base(args))
    write_weights(base(args), model.state_dict())

    shared.write_samples(args.scratch, args.data_dir)
    supervised = []  # tokens a sample
    for path, number in zip(samples(args), (args.steps * STEP_SIZE, 32)):
        data = utils.RoleDataset(read_samples(path), given.tokenizer, 512, 256, is_skip=True)
        order = np.random.default_rng(0).permutation(len(data))
        chosen = np.resize(order, number)  # a small file is gone through again
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[data.numbers[index] - 1] for index in chosen), encoding="utf-8")
        supervised.append(float(data.supervised[chosen].mean()))
    text = f"{model.num_parameters():,} in bfloat16, {len(given.tokenizer):,} pieces, peak {peak_memory_gb():.1f} GB"
    return {"text": text, "supervised": supervised[0]}


def relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return shared.relative_difference(dict(enumerate(found)), dict(enumerate(expected)))


def llama(args) -> dict:
    """Float32 agrees to rounding; in bfloat16 this model is no farther from float32 than LlamaForCausalLM is."""
    directory = ModelDirectory(base(args))
    prompts = bench_predict.distinct_prompts(samples(args)[1])[:8]  # of several lengths, so that there is a mask
    texts = [messages_to_ids(directory.tokenizer, prompt) for prompt in prompts]
    model = shared.random_model(args.size, torch.bfloat16, pick_device("auto"), directory.config.vocab_size)
    half, their_half = merge_params.logits_of(model, texts), merge_params.logits_of(shared.as_llama(model), texts)
    gc.collect()  # of the LlamaForCausalLM, which holds the same tensors
    model.float()  # a tensor at a time, so that one copy of the model is in memory
    found, expected = merge_params.logits_of(model, texts), merge_params.logits_of(shared.as_llama(model), texts)
    single, own, their = (relative(logits, expected) for logits in (found, half, their_half))
    text = f"float32 differs by {single:.1e} of the logits' norm; bfloat16 from float32 by {own:.1e}, "
    text += f"LlamaForCausalLM itself by {their:.1e}"
    if not (single <= 1e-4 and own <= 1.5 * their + 1e-3):
        raise UserError(text)
    return {"text": f"{text}; peak {peak_memory_gb():.1f} GB"}


def gradients(args) -> dict:
    device, tokenizer = pick_device("auto"), ModelDirectory(base(args)).tokenizer
    data = utils.RoleDataset(read_samples(samples(args)[0]), tokenizer, 512, 256)
    texts = []
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        size = "wide" if args.size == "7b" else args.size
        model = shared.with_lora(shared.random_model(size, dtype, device, len(tokenizer)))
        found = {}
        for way in ("tree", "padded"):
            model.zero_grad()
            OwnSteps(way, model, device).backward(data, np.arange(STEP_SIZE))
            trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
            found[way] = {name: parameter.grad.float() for name, parameter in trained}
        difference = shared.relative_difference(found["tree"], found["padded"])
        texts.append(f"{str(dtype)[6:]} differs by {difference:.1e}")
        if not difference <= most:
            raise UserError(texts[-1])
    return {"text": "; ".join(texts)}


# ---------------------------------------------------------------- training


def peers(args) -> dict:
    """Samples a second of all ways, of the same card in the same process."""
    dtype = "bfloat16" if has_bfloat16() else "float32"
    flags = ["--size", args.size, "--dtype", dtype, "--checkpointing", "--samples", "8", "32", "--steps", "3"]
    flags += ["--data_dir", str(args.data_dir), *(["--tokenizer_dir", str(args.tokenizer)] if args.tokenizer else [])]
    with open(args.out / "peers.txt", "w", encoding="utf-8") as file, redirect_stdout(file):
        rates = bench_train.table(bench_train.parse_args(flags))
    texts = []
    for size in (8, 32):
        texts.append(f"samples/s at {size} a step: ")
        texts[-1] += ", ".join(f"{way} {rate:.1f}" for (number, way), rate in rates.items() if number == size)
    return {"text": "; ".join(texts), "rates": [[*way, rate] for way, rate in rates.items()]}


def adamw(args) -> dict:
    """Both halves of a step by themselves; and the memory of the longest row, with that of the optimizer."""
    gather, update, steps = training_step(book_flags(args, args.scratch / "halves"))
    device, seconds, laid_out = pick_device("auto"), [], [steps[number] for number in range(min(10, len(steps)))]
    for batches, tokens in laid_out:
        with shared.stopwatch(device) as first:
            numbers = gather(batches, tokens)
        with shared.stopwatch(device) as second:
            update(numbers)
        seconds.append((first.seconds, second.seconds))
    first, second = (statistics.median(half[len(half) // 2 :]) for half in zip(*seconds))
    text = f"{second * 1e3:.1f} ms in engine.step(), {second / (first + second):.1%} of a step"
    row = max((batch for batches, _ in laid_out for batch in batches), key=lambda batch: batch["input_ids"].numel())
    size = memory_table.RowSize(row["input_ids"].numel(), len(row["loss_positions"]))
    way = memory_table.Way(2, 16, dropout=True, checkpointing=False, four_bit=False)
    config = ModelDirectory(base(args)).config
    parts = (memory_table.weight_bytes(config, way), memory_table.trained_bytes(config, way))
    computed = (sum(parts) + memory_table.row_bytes(config, way, size)) / 1e9
    text += f"; peak {peak_memory_gb():.1f} GB, computed {computed:.1f} GB with a row of {size.tokens} tokens"
    return {"text": text, "peak_gb": peak_memory_gb(), "computed_gb": computed}


def kernels(args) -> dict:
    """The kernels of a few steps after some that warm up; on the CPU its operations."""
    number = 5 if args.steps >= 10 else 1
    gather, update, steps = training_step(book_flags(args, args.scratch / "profiled"))
    laid_out = [steps[step] for step in range(2 * number)]
    for batches, tokens in laid_out[:number]:
        update(gather(batches, tokens))
    device = pick_device("auto")
    with torch.profiler.profile() as profile, shared.stopwatch(device) as watch:
        for batches, tokens in laid_out[number:]:
            update(gather(batches, tokens))
    kind, found = getattr(torch.autograd.DeviceType, device.type.upper()), []
    for event in profile.key_averages():
        if event.device_type == kind and not event.is_user_annotation:
            spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total  # microseconds
            found.append((spent / 1e3 / number, event.count / number, event.key))  # milliseconds and times of one step
    busy, launches = sum(ms for ms, *_ in found), sum(times for _, times, _ in found)
    passed = watch.seconds * 1e3 / number
    text = f"{launches:.0f} kernels a step, {busy:.1f} ms; {passed:.1f} ms pass, the profiler's own included"
    lines = [text, "", "  ms a step   share   times a step  name"]
    for ms, times, name in sorted(found, reverse=True)[:15]:
        lines.append(f"{ms:11.3f} {ms / busy:7.1%} {times:14.1f}  {name[:160]}")
    (args.out / "profile.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"text": f"{text}; most of it {max(found)[2][:60]}"}


# ---------------------------------------------------------------- merging and answering


def merge(args) -> dict:
    adapters = [path for _, path in checkpoints(args.scratch / "tree_rows")[-1:]]
    if not adapters:
        raise UserError("no training part has written an adapter")
    paths = ["--ori_model_dir", base(args), "--model_dir", adapters[0], "--save_model_dir", args.scratch / "merged"]
    with redirect_stdout(StringIO()) as printed:
        merge_params.main([*map(str, paths), "--device", "auto", "--overwrite"])
    proof = next(line for line in printed.getvalue().splitlines() if line.startswith("largest difference"))
    largest, most, alone = map(float, proof.split()[-3:])
    text = f"largest difference of the logits {largest:.1e}, at most {most:.1e}, of the base alone {alone:.1e}"
    return {"text": f"{text}; peak {peak_memory_gb():.1f} GB"}


def page(args) -> dict:
    device = pick_device("auto")
    speaker = Speaker.load(base(args), None, device)
    messages = bench_predict.distinct_prompts(samples(args)[1])[0]
    settings = {"do_sample": False, "seed": -1, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    seconds = []
    for _ in range(4):
        with shared.stopwatch(device) as whole:
            stream = speaker.stream(messages, settings)
            with shared.stopwatch(device) as first:
                next(stream)
            for _ in stream:
                pass
        seconds.append((first.seconds, whole.seconds))
    first, whole = map(statistics.median, zip(*seconds[1:]))  # the first of all computes the persona's cache
    text = f"first text after {first * 1e3:.0f} ms, {TOKENS / whole:.1f} tokens/s; peak {peak_memory_gb():.1f} GB"
    return {"text": text}


def predict(args) -> dict:
    directory = ModelDirectory(base(args))
    tokenizer, model = directory.tokenizer, directory.load().to(pick_device("auto"))
    prompts = bench_predict.distinct_prompts(samples(args)[1])
    config = greedy(directory.generation_config, TOKENS)
    config.eos_token_id = [tokenizer.vocab_size]  # of no token, so that every answer has as many
    bench_predict.by_predict(model, tokenizer, prompts[:1], config)  # warms up
    texts = []
    for size in (16, 64, 128):
        chosen = [prompts[number % len(prompts)] for number in range(size)]
        with shared.stopwatch(model.device) as watch:
            bench_predict.by_predict(model, tokenizer, chosen, config)
        texts.append(f"{size / watch.seconds:.1f} answers/s, {size} side by side")
    return {"text": f"{TOKENS} tokens each: {'; '.join(texts)}; peak {peak_memory_gb():.1f} GB"}
