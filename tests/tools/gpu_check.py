"""What only a GPU can show, in nine minutes on one card of 40 GB or more; the table is printed, all else goes to --out.

    python3 tests/tools/gpu_check.py --data_dir data --tokenizer Baichuan2-7B-Chat
    python3 tests/tools/gpu_check.py --size tiny --steps 6        # everything once on the CPU, to see that it runs

Weights are random, with the sizes of the real model; without --tokenizer the vocabulary is the stand-in's, and the head
small. Every part runs in a process of its own: one that fails, or takes three times as long as it should, is a row of the
table, and the others still run. What does not fit into --seconds any more is skipped. To --out go, after every part,
table.md, gpu_check.json, profile.txt (where the time of a training step goes, by kernel) and log.txt (all that was
printed). CUDA_VISIBLE_DEVICES chooses the card.
"""

import gc
import importlib.util
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from support.command_line import ArgumentParser, number_problems  # noqa: E402 - the project lies in the root
from support.dialogues.samples import read_samples  # noqa: E402
from support.errors import UserError, entry_point, first_line, slow_imports  # noqa: E402

SAMPLE = ROOT / "data/sample"
BOOK_STEPS = 1002  # an epoch of the chapter
STEP_SIZE = 8  # samples, the chapter's 2 × 4
PARTS = {  # name: (seconds that it is expected to take at 7b, what it shows)
    "card": (20, "the card, and what it reaches in a matrix product and in a copy"),
    "weights": (60, "random weights, made on the device, as a model directory; samples"),
    "llama": (40, "logits against those of transformers' LlamaForCausalLM"),
    "gradients": (30, "gradients of tree rows against those of padded rows, two layers"),
    "tree_rows": (50, "the chapter's training command, without --gradient_checkpointing"),
    "kernels": (45, "kernels of such a step, by time"),
    "four_bits": (60, "… with --load_in_4bit"),
    "checkpointing": (50, "… with --gradient_checkpointing"),
    "padded_rows": (50, "… with --packing none"),
    "merge": (60, "merge_params.py on the device, with its proof"),
    "page": (45, "the chat page's generator"),
    "predict": (45, "answers side by side, as predict.py gives them"),
    "resume": (90, "a run that is killed, and resumed"),
    "ask": (40, "web_demo.py --ask"),
}
TRAINING = {  # flags beside the chapter's
    "tree_rows": [],
    "four_bits": ["--load_in_4bit"],
    "checkpointing": ["--gradient_checkpointing"],
    "padded_rows": ["--packing", "none"],
}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path(os.environ.get("OUT", "output_dir/gpu_check")), help="directory for results")
    add("--size", default="7b", choices=["tiny", "small", "7b"], help="sizes of the model; 7b needs a GPU")
    add("--data_dir", type=Path, default=SAMPLE, help="RoleBench files; by default the project's own sample")
    add("--tokenizer", type=Path, help="directory of the published model, or its JSON files and tokenizer.model alone")
    add("--device", default="auto", choices=["auto", "cpu"], help="where to compute")
    add("--steps", type=int, default=30, help="training steps of a run")
    add("--batch_sizes", type=int, nargs="+", default=[16, 64, 128], help="questions side by side")
    add("--tokens", type=int, default=64, help="tokens of an answer")
    add("--repeats", type=int, default=3, help="answers of the page that are timed")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to do; most need the part weights")
    add("--seconds", type=int, default=540, help="for everything")
    add(
        "--scratch",
        type=Path,
        help="directory for models and runs, some 35 GB at 7b, to be kept; default: a temporary one",
    )
    add("--only", choices=PARTS, help="do this part here and now, as its own process does")
    return parser.parse_args(argv)


with slow_imports(parse_args, __name__):
    import numpy as np
    import psutil
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import LlamaForCausalLM

    import data_helper
    import merge_params
    import utils
    from baichuan import llama_export
    from baichuan.generation_utils import messages_to_ids
    from support.device import pick_device
    from support.model.answering import greedy
    from support.model.comparison import logits_of
    from support.model.directory import ModelDirectory
    from support.model.weights import load_shard, write_weights
    from support.page.speaker import Speaker
    from support.scores.table import markdown
    from support.training.checkpoints import checkpoints, newest_state
    from support.training.log import peak_memory_gb
    from support.training.processes import has_bfloat16
    from tests.tools import bench_chat, bench_predict, bench_train, sample_model


class Skipped(Exception):
    """A part that cannot be done here; says why."""


class Failed(Exception):
    """A part that came to a wrong result; says which."""


def base(args) -> Path:
    return args.scratch / "model"


def samples(args) -> tuple[Path, Path]:
    return args.scratch / "train.json", args.scratch / "test.json"


# ---------------------------------------------------------------- the card and the model


def card(args) -> dict:
    device = pick_device(args.device)
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32  # as the training takes it
    numbers = {"name": f"{torch.get_num_threads()} CPU threads", "torch": torch.__version__, "type": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        numbers |= {"name": properties.name, "memory_gb": properties.total_memory / 1e9}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which(query[0]):
            numbers["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0]
    numbers["matmul"] = bench_train.matmul_rate(device, dtype)  # FLOP/s
    source = torch.randn((2**32 if device.type == "cuda" else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        bench_train.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        bench_train.synchronize(device)
        seconds.append(time.perf_counter() - start)
    numbers["copy"] = 2 * source.nbytes / statistics.median(seconds[2:])  # bytes read and written, a second
    memory = f", {numbers['memory_gb']:.0f} GB" if "memory_gb" in numbers else ""
    memory += f", driver {numbers['driver']}" if "driver" in numbers else ""
    numbers["text"] = (
        f"{numbers['name']}{memory}, torch {torch.__version__}: {numbers['matmul'] / 1e12:.3g} TFLOP/s in a product in "
        f"{str(dtype).removeprefix('torch.')}, {numbers['copy'] / 1e12:.2g} TB/s in a copy"
    )
    return numbers


def weights(args) -> dict:
    """Random weights, written as a model directory; of the data as many samples as the steps take, all within limits."""
    device = pick_device(args.device)
    tokenizer_dir = args.tokenizer or sample_model.write_model(args.scratch / "stand-in")
    directory = ModelDirectory(tokenizer_dir)
    tokenizer = directory.tokenizer
    model = bench_train.random_model(args.size, torch.bfloat16, device, "sdpa", len(tokenizer))
    shutil.rmtree(base(args), ignore_errors=True)
    base(args).mkdir(parents=True)
    model.config.dtype = torch.bfloat16
    merge_params.save_baichuan(base(args), model.config, tokenizer)
    generation = json.loads((directory.path / "generation_config.json").read_text(encoding="utf-8"))
    generation["max_new_tokens"] = args.tokens
    (base(args) / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    write_weights(base(args), model.state_dict())

    every, asked = args.scratch / "every.json", samples(args)[1]
    paths = {"--data_dir": args.data_dir, "--train_path": every, "--test_path": asked}
    roles = ["--roles", "all"] if args.data_dir == SAMPLE else []
    data_helper.main([*(str(part) for pair in paths.items() for part in pair), *roles])
    for path, number in zip((every, asked), (args.steps * STEP_SIZE, 32)):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        data = utils.RoleDataset(read_samples(path), tokenizer, 512, 256, is_skip=True)
        order = np.random.default_rng(0).permutation(len(data))
        chosen = np.resize(order, number)  # a small file is gone through again
        target = samples(args)[0] if path == every else asked
        target.write_text("".join(lines[data.numbers[index] - 1] for index in chosen), encoding="utf-8")
        if path == every:
            supervised = float(data.supervised[chosen].mean())
    parameters = sum(tensor.numel() for tensor in model.state_dict().values())
    return {
        "text": f"{parameters:,} in bfloat16, {len(tokenizer):,} pieces, peak {peak_memory_gb():.1f} GB",
        "supervised": supervised,  # tokens a sample
        "parameters": parameters,
        "vocabulary": len(tokenizer),
    }


def relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    difference = torch.cat([f - e for f, e in zip(found, expected)])
    return (difference.norm() / torch.cat(expected).norm()).item()


def as_llama(model) -> LlamaForCausalLM:
    """The same model, mostly in the same memory."""
    model.config.merged_adapter = None
    config = llama_export.llama_config(model.config)
    with torch.device("meta"):
        llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(dict(llama_export.llama_tensors(model.state_dict().items())), assign=True)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config).to(model.device)  # has a buffer that no file holds
    return llama


def llama(args) -> dict:
    """Float32 agrees to rounding; in bfloat16 this model is no farther from float32 than LlamaForCausalLM is."""
    device, directory = pick_device(args.device), ModelDirectory(base(args))
    prompts = bench_predict.distinct_prompts(samples(args)[1])[:8]  # of several lengths, so that there is a mask
    texts = [messages_to_ids(directory.tokenizer, prompt) for prompt in prompts]
    vocabulary = directory.config.vocab_size
    model = bench_train.random_model(args.size, torch.bfloat16, device, "sdpa", vocabulary)
    half, their_half = logits_of(model, texts), logits_of(as_llama(model), texts)
    gc.collect()  # of the LlamaForCausalLM, which holds the same tensors
    model.float()  # a tensor at a time, so that one copy of the model is in memory
    found, expected = logits_of(model, texts), logits_of(as_llama(model), texts)
    numbers = {
        "float32": relative(found, expected),
        "bfloat16": relative(half, expected),
        "llama_bfloat16": relative(their_half, expected),
    }
    text = (
        f"float32 differs by {numbers['float32']:.1e} of the logits' norm; bfloat16 from float32 by "
        f"{numbers['bfloat16']:.1e}, LlamaForCausalLM itself by {numbers['llama_bfloat16']:.1e}"
    )
    if not (numbers["float32"] <= 1e-4 and numbers["bfloat16"] <= 1.5 * numbers["llama_bfloat16"] + 1e-3):
        raise Failed(text)
    return {"text": f"{text}; peak {peak_memory_gb():.1f} GB", **numbers}


def gradients(args) -> dict:
    device, tokenizer = pick_device(args.device), ModelDirectory(base(args)).tokenizer
    data = utils.RoleDataset(read_samples(samples(args)[0]), tokenizer, 512, 256)
    options = SimpleNamespace(attn_implementation="sdpa", max_pack_len=4096)
    size = "wide" if args.size == "7b" else args.size
    numbers = {}
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        model = bench_train.random_model(size, dtype, device, "sdpa", len(tokenizer))
        model = bench_train.with_lora(model, utils.find_all_linear_names(model))
        tree, padded = (
            bench_train.OwnSteps(way, model, None, options, device).gradients(data, np.arange(STEP_SIZE))
            for way in ("tree", "padded")
        )
        numbers[str(dtype)[6:]] = difference = bench_train.relative_difference(tree, padded)
        if not difference <= most:
            raise Failed(f"gradients of tree rows differ from those of padded rows by {difference:.1e} in {dtype}")
    return {"text": "; ".join(f"{name} differs by {value:.1e}" for name, value in numbers.items()), **numbers}


# ---------------------------------------------------------------- training


def book_flags(args, run: Path, *more) -> list[str]:
    train_path, test_path = samples(args)
    flags = {
        **{"--train_path": train_path, "--test_path": test_path, "--model_name_or_path": base(args)},
        **{"--per_device_train_batch_size": 2, "--max_len": 512, "--max_src_len": 256, "--learning_rate": 1e-4},
        **{"--weight_decay": 0.1, "--num_train_epochs": 1, "--gradient_accumulation_steps": 4, "--warmup_ratio": 0.03},
        **{"--seed": 1234, "--show_loss_step": 1, "--lora_dim": 16, "--lora_alpha": 64, "--lora_dropout": 0.1},
        **{"--save_model_step": args.steps // 2, "--sample_answers": 0, "--output_dir": run},
        "--ds_file": ROOT / "ds_zero2_no_offload.json",
    }
    return [str(part) for pair in flags.items() for part in pair] + ["--is_skip", *more]


def train_command(args, run: Path, *more) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(port)]
    return [*launcher, str(ROOT / "train.py"), *book_flags(args, run, *more)]


def curve(run: Path, name: str) -> dict[int, float]:
    """{step: value} of what a run has told TensorBoard."""
    events = EventAccumulator(str(run / "runs"), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def last_adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_shard(checkpoints(run)[-1][1] / "adapter_model.safetensors")


def training(args, name: str) -> dict:
    run = args.scratch / name
    shutil.rmtree(run, ignore_errors=True)
    execute(args, train_command(args, run, *TRAINING[name]))
    warm = min(5, args.steps // 2)
    samples_s, tokens_s = (list(curve(run, f"{what}_per_second").values())[warm:] for what in ("samples", "tokens"))
    seconds = STEP_SIZE / statistics.median(samples_s)
    tokens = STEP_SIZE * statistics.mean(t / s for t, s in zip(tokens_s, samples_s))
    losses = list(curve(run, "train_loss").values())
    numbers = {"ms": seconds * 1e3, "samples_per_second": STEP_SIZE / seconds, "tokens_a_step": tokens}
    numbers |= {"peak_gb": max(curve(run, "peak_memory_gb").values()), "losses": losses}
    numbers["book_seconds"] = BOOK_STEPS * seconds
    share = ""
    if (card := found_before(args, "card")) and (weights := found_before(args, "weights")):
        config = SimpleNamespace(**json.loads((base(args) / "config.json").read_text(encoding="utf-8")))
        adapters = sum(tensor.numel() for tensor in last_adapter(run).values())
        work = bench_train.arithmetic(config, adapters, tokens, STEP_SIZE * weights["supervised"])
        numbers["share"] = work / seconds / card["matmul"]
        share = f"{numbers['share']:.0%} of the matrix-product rate, "
    numbers["text"] = (
        f"{numbers['ms']:.1f} ms a step (median of {len(samples_s)}), {numbers['samples_per_second']:.1f} samples/s, "
        f"{tokens:.0f} tokens a step, {share}peak {numbers['peak_gb']:.1f} GB; {BOOK_STEPS:,} steps in "
        f"{numbers['book_seconds']:.0f} s; loss {losses[0]:.2f} → {losses[-1]:.2f}"
    )
    return numbers


def kernels(args) -> dict:
    """The kernels of a few steps after some that warm up; on the CPU its operations."""
    warm, measured = (5, 5) if args.steps >= 10 else (1, 1)
    step, _ = bench_train.training_step(book_flags(args, args.scratch / "profiled"))
    for number in range(warm):
        step(number)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    cuda = torch.cuda.is_initialized()
    with torch.profiler.profile(activities=kinds + [torch.profiler.ProfilerActivity.CUDA] * cuda) as profile:
        start = time.perf_counter()
        for number in range(warm, warm + measured):
            step(number)
        bench_train.synchronize(torch.device("cuda" if cuda else "cpu"))
        seconds = (time.perf_counter() - start) / measured
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    found = {}  # name: (times, milliseconds), each of one step
    for event in profile.key_averages():
        if event.device_type == kind and not getattr(event, "is_user_annotation", False):
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total  # microseconds
            found[event.key] = (event.count / measured, spent / 1e3 / measured)
    first = sorted(found.items(), key=lambda item: -item[1][1])[:15]
    launches, busy = (sum(column) for column in zip(*found.values()))
    what = "kernels" if cuda else "operations"
    lines = [f"{launches:.0f} {what} a step, {busy:.1f} ms; {seconds * 1e3:.1f} ms pass (the profiler's own included)"]
    lines += ["", "  ms a step   share   times a step  name"]
    lines += [f"{ms:11.3f} {ms / busy:7.1%} {times:14.1f}  {name[:160]}" for name, (times, ms) in first]
    (args.out / "profile.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    top = [{"name": name, "times": times, "ms": ms} for name, (times, ms) in first]
    text = f"{lines[0]}; most of it {first[0][0][:60]}"
    return {"text": text, "launches": launches, "busy_ms": busy, "profiled_ms": seconds * 1e3, "top": top}


def resume(args) -> dict:
    """Killed after its first save and resumed; then compared with the run of the part tree_rows."""
    run, half = args.scratch / "killed", args.steps // 2
    shutil.rmtree(run, ignore_errors=True)
    command = start(args, train_command(args, run))
    while command.poll() is None and newest_state(run)[0] < half:
        if time.time() > args.part_end:
            end_process(command)
            raise Failed("no state was saved in time")
        time.sleep(0.01)
    if command.returncode:
        raise Failed(last_words(args))
    end_process(command)
    last = max(curve(run, "train_loss"))
    execute(args, train_command(args, run, "--resume"))
    steps = list(curve(run, "train_loss"))
    if max(steps) != args.steps:
        raise Failed(f"the resumed run ended at step {max(steps)} of {args.steps}")
    text, numbers = f"killed at step {last}, went on after {half}", {"killed_at": last, "difference": None}
    if checkpoints(args.scratch / "tree_rows"):
        found, expected = last_adapter(run), last_adapter(args.scratch / "tree_rows")
        trained = {name: tensor.float() for name, tensor in expected.items() if "lora_B" in name}  # A hardly moves
        found = {name: found[name].float() for name in trained}
        numbers["difference"] = bench_train.relative_difference(found, trained)
        text += f"; B of the adapters differ from an uninterrupted run's by {numbers['difference']:.1e}"
        if not numbers["difference"] < 0.3:  # on a GPU sums come in any order; another course would give 1 and more
            raise Failed(text)
    return {"text": text, **numbers}


# ---------------------------------------------------------------- merging and answering


def merge(args) -> dict:
    adapters = [path for name in TRAINING for _, path in checkpoints(args.scratch / name)[-1:]]
    if not adapters:
        raise Skipped("no training part has written an adapter")
    printed = StringIO()
    paths = ["--ori_model_dir", base(args), "--model_dir", adapters[0], "--save_model_dir", args.scratch / "merged"]
    try:
        with redirect_stdout(printed):
            merge_params.main([*map(str, paths), "--device", args.device, "--overwrite"])
    finally:
        print(printed.getvalue())
    proof = next(line for line in printed.getvalue().splitlines() if line.startswith("largest difference"))
    largest, most, alone = map(float, proof.split()[-3:])
    text = f"largest difference of the logits {largest:.1e}, at most {most:.1e}, of the base alone {alone:.1e}"
    peak = peak_memory_gb()
    return {"text": f"{text}; peak {peak:.1f} GB", "largest": largest, "most": most, "alone": alone, "peak_gb": peak}


def page(args) -> dict:
    device = pick_device(args.device)
    speaker = Speaker.load(base(args), None, device)
    numbers = bench_chat.medians(speaker, 1, args.tokens, args.repeats, device)
    numbers["tokens_per_second"] = args.tokens / numbers["page"]
    text = (
        f"prompt of {numbers['length']:.0f} tokens: first text after {numbers['first'] * 1e3:.0f} ms (a bare forward: "
        f"{numbers['forward'] * 1e3:.0f} ms), {numbers['tokens_per_second']:.1f} tokens/s (generate alone: "
        f"{args.tokens / numbers['generate']:.1f}); peak {peak_memory_gb():.1f} GB"
    )
    return {"text": text, **numbers}


def predict(args) -> dict:
    device, directory = pick_device(args.device), ModelDirectory(base(args))
    model = directory.load().to(device)
    prompts = bench_predict.distinct_prompts(samples(args)[0])
    config = greedy(directory.generation_config, args.tokens)
    config.eos_token_id = [directory.tokenizer.vocab_size]  # of no token, so that every answer has as many
    answer = partial(bench_predict.answer_in_batches, bench_predict.by_predict, model, directory.tokenizer)
    answer(prompts[:1], 1, config)  # warms up
    rates, texts = {}, []
    for size in args.batch_sizes:
        chosen = [prompts[number % len(prompts)] for number in range(size)]
        try:
            rates[size], *_ = answer(chosen, size, config)
            texts.append(f"batch {size}: {rates[size]:.1f} answers/s ({rates[size] * args.tokens:.0f} tokens/s)")
        except torch.OutOfMemoryError:
            texts.append(f"batch {size}: too little memory")
            torch.cuda.empty_cache()
    text = f"{args.tokens} tokens each; {'; '.join(texts)}; peak {peak_memory_gb():.1f} GB"
    return {"text": text, "answers_per_second": rates}


def ask(args) -> dict:
    if importlib.util.find_spec("gradio") is None:
        raise Skipped("gradio is not installed here")
    merged = args.scratch / "merged"
    model, desc = merged if merged.exists() else base(args), ROOT / "data/sample/profiles-zh_desc.json"
    flags = ["--model_path", model, "--desc_path", desc, "--device", args.device, "--ask", "你是谁？"]
    begin = time.time()
    execute(args, [sys.executable, str(ROOT / "web_demo.py"), *map(str, flags)])
    seconds = time.time() - begin
    return {"text": f"answered in {seconds:.0f} s, loading included", "seconds_to_answer": seconds}


# ---------------------------------------------------------------- running the parts


def start(args, command: list[str]) -> subprocess.Popen:
    """A process that writes to the log."""
    environment = {"CUDA_VISIBLE_DEVICES": "0", "PYTHONUNBUFFERED": "1", **os.environ}  # as in the chapter's line
    with open(args.out / "log.txt", "ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)


def end_process(process: subprocess.Popen):
    """End it and all that it has started, at once."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(family, timeout=30)
    process.wait()


def execute(args, command: list[str]):
    """Run a command to its end. Raises: Failed with the last line of its error, also where it takes too long."""
    process = start(args, command)
    try:
        process.wait(max(1, args.part_end - time.time()))
    except subprocess.TimeoutExpired:
        end_process(process)
        raise Failed(f"did not end in time; its last words: {last_words(args)}") from None
    if process.returncode:
        raise Failed(last_words(args))


def last_words(args) -> str:
    """The last line of this part's log that names an error, or its last line."""
    log = (args.out / "log.txt").read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in re.split("[\r\n]", log.rpartition("──── ")[2]) if line.strip()]
    errors = [line for line in lines if re.match(r"(\[rank\d\]: )?(error:|[\w.]*(Error|Exception|Failed)\b)", line)]
    return (errors or lines or ["it ended without a word"])[-1][:300]


def do(args, name: str) -> dict:
    """A part's numbers. Raises: Failed, Skipped."""
    needs, _ = PARTS[name]
    patience = 3 if args.size == "7b" else 30  # a CPU with a tiny model spends its time at starting
    args.part_end = min(args.end, time.time() + patience * needs)
    if args.end - time.time() < (needs if args.size == "7b" else 10):
        raise Skipped(f"does not fit into --seconds {args.seconds} any more")
    if name not in ("card", "weights") and not (base(args) / "config.json").exists():
        raise Skipped("has no model: the part weights has to come first, and to succeed")
    if name in TRAINING:
        return training(args, name)
    if name in ("resume", "ask"):
        return {"resume": resume, "ask": ask}[name](args)
    flags = {"--out": args.out, "--size": args.size, "--data_dir": args.data_dir, "--device": args.device}
    flags |= {"--steps": args.steps, "--tokens": args.tokens, "--repeats": args.repeats, "--scratch": args.scratch}
    flags |= {"--tokenizer": args.tokenizer} if args.tokenizer else {}
    flags = [str(part) for pair in flags.items() for part in pair]
    execute(args, [sys.executable, __file__, *flags, "--batch_sizes", *map(str, args.batch_sizes), "--only", name])
    found = found_before(args, name)
    if "skipped" in found:
        raise Skipped(found["skipped"])
    return found


def found_before(args, name: str) -> dict | None:
    """What a part in a process of its own has left."""
    path = args.scratch / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def attempt(args, name: str) -> dict:
    """What became of a part, whatever that is."""
    begin = time.time()
    with open(args.out / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n──── {name}: {PARTS[name][1]}\n")
    try:
        found = {"status": "ok", **do(args, name)}
    except Skipped as reason:
        found = {"status": "skipped", "text": str(reason)}
    except Failed as error:
        found = {"status": "FAILED", "text": str(error)}
    except Exception as error:  # any, so that the other parts go on
        found = {"status": "FAILED", "text": f"{type(error).__name__}: {first_line(error)}"}
    return found | {"seconds": time.time() - begin}


def own_process(args):
    """Do one part, and leave what it found in a file."""
    part = globals()[args.only]
    try:
        found = part(args)
    except Skipped as reason:
        found = {"skipped": str(reason)}
    except Failed as error:
        raise UserError(str(error)) from error
    (args.scratch / f"{args.only}.json").write_text(json.dumps(found), encoding="utf-8")


def write(args, results: dict):
    rows = [["part", "", "s", "result"]]
    for name, found in results.items():
        rows.append([name, found["status"], f"{found['seconds']:.0f}", found["text"].replace("|", "/")])
    table = "\n".join(markdown(rows)) + "\n"
    (args.out / "table.md").write_text(table, encoding="utf-8")
    settings = {name: str(value) for name, value in vars(args).items()}
    (args.out / "gpu_check.json").write_text(
        json.dumps({"arguments": settings, "parts": results}, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    return table


@entry_point
def main(argv=None):
    args = parse_args(argv)
    for name in ("out", "scratch", "data_dir", "tokenizer"):  # commands run in the project's directory
        if path := getattr(args, name):
            setattr(args, name, path.resolve())
    if args.only:
        return own_process(args)
    if problems := number_problems(args, {"steps": 4, "tokens": 2, "repeats": 1, "seconds": 1}):
        raise UserError(*problems)
    if args.size == "7b" and pick_device(args.device).type == "cpu":
        raise UserError("--size 7b: there is no GPU here: give --size tiny to see that everything runs")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "log.txt").write_bytes(b"")
    args.end, results = time.time() + args.seconds, {}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as temporary:
        args.scratch = args.scratch or Path(temporary)
        args.scratch.mkdir(parents=True, exist_ok=True)
        if args.size == "7b" and shutil.disk_usage(args.scratch).free < 36e9:
            raise UserError(f"{args.scratch}: less than 36 GB are free: name another directory with --scratch")
        for name in args.parts:
            results[name] = attempt(args, name)
            table = write(args, results)
            print("{}: {status}, {seconds:.0f} s: {text}".format(name, **results[name]), flush=True)
    print(f"\n{table}")
    if any(found["status"] == "FAILED" for found in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
