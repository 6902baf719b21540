"""What only a GPU can show, in nine minutes on one card of 40 GB or more; the table is printed, all else goes to --out.

    python3 tests/tools/gpu_check.py --data_dir data --tokenizer Baichuan2-7B-Chat
    python3 tests/tools/gpu_check.py --size tiny --steps 6        # everything once on the CPU, to see that it runs

Weights are random, with the sizes of the real model; without --tokenizer the vocabulary is the stand-in's, and the head
small, except in the part peers. Every part runs in a process of its own: one that fails, or takes three times as long as it should, is a row of the
table, and the others still run. What does not fit into --seconds any more is skipped. To --out go, after every part,
table.md, gpu_check.json, profile.txt (where the time of a training step goes, by kernel) and log.txt (all that was
printed), and peers.txt (the table of that part). CUDA_VISIBLE_DEVICES chooses the card.
"""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from baichuan import BaichuanConfig
from support.command_line import ArgumentParser, integer
from support.device import pick_device
from support.errors import UserError, entry_point, first_line
from support.model.weights import load_shard
from support.scores.table import markdown
from support.training.checkpoints import checkpoints, newest_state
from tests.tools import gpu_parts, shared
from tests.tools.gpu_parts import STEP_SIZE, base, book_flags

BOOK_STEPS = 1002  # an epoch of the chapter
PARTS = {  # name: (seconds that it is expected to take at 7b, what it shows); what matters most comes first
    "card": (20, "the card, and what it reaches in a matrix product and in a copy"),
    "weights": (60, "random weights, made on the device, as a model directory; samples"),
    "tree_rows": (50, "the chapter's training command, without --gradient_checkpointing"),
    "merge": (60, "merge_params.py on the device, with its proof"),
    "peers": (110, "steps of 8 and 32 samples: book, padded rows, trees, and transformers' Trainer with PEFT"),
    "adamw": (45, "the optimizer's share of a step; peak memory beside the computed one"),
    "padded_rows": (50, "the chapter's training command with --packing none"),
    "page": (45, "the chat page's generator"),
    "predict": (45, "answers side by side, as predict.py gives them"),
    "kernels": (45, "kernels of a step in tree rows, by time"),
    "llama": (40, "logits against those of transformers' LlamaForCausalLM"),
    "checkpointing": (50, "the chapter's training command with --gradient_checkpointing"),
    "four_bits": (60, "the chapter's training command with --load_in_4bit"),
    "gradients": (30, "gradients of tree rows against those of padded rows, two layers"),
    "resume": (90, "a run that is killed, and resumed"),
}
TRAINING = {  # flags beside the chapter's
    "tree_rows": [],
    "padded_rows": ["--packing", "none"],
    "checkpointing": ["--gradient_checkpointing"],
    "four_bits": ["--load_in_4bit"],
}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path(os.environ.get("OUT", "output_dir/gpu_check")), help="directory for results")
    add("--size", default="7b", choices=["tiny", "7b"], help="sizes of the model; 7b needs a GPU")
    add("--data_dir", type=Path, default=shared.SAMPLE, help="RoleBench files; by default the project's own sample")
    add("--tokenizer", type=Path, help="directory of the published model, or its JSON files and tokenizer.model alone")
    add("--steps", type=integer(4), default=30, help="training steps of a run")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to do; most need the part weights")
    add("--seconds", type=integer(1), default=540, help="for everything")
    add("--scratch", type=Path, help="directory for models and runs, 36 GB at 7b, which stay; default: a temporary one")
    add("--only", choices=PARTS, help="do this part here and now, as its own process does")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- training


def train_command(args, run: Path, *more) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", "5545"]
    return [*launcher, str(shared.ROOT / "train.py"), *book_flags(args, run), *more]


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
    rate, losses = statistics.median(samples_s), list(curve(run, "train_loss").values())
    tokens = STEP_SIZE * statistics.mean(t / s for t, s in zip(tokens_s, samples_s))
    numbers = {"samples_per_second": rate, "ms": STEP_SIZE / rate * 1e3, "tokens_a_step": tokens, "losses": losses}
    numbers |= {"book_seconds": BOOK_STEPS * STEP_SIZE / rate, "peak_gb": max(curve(run, "peak_memory_gb").values())}
    text = f"{numbers['ms']:.1f} ms a step, {rate:.1f} samples/s, {tokens:.0f} tokens a step"
    if "matmul" in args.results.get("card", {}) and "supervised" in args.results.get("weights", {}):
        adapters = sum(tensor.numel() for tensor in last_adapter(run).values())
        head = STEP_SIZE * args.results["weights"]["supervised"]
        work = shared.arithmetic(BaichuanConfig.from_pretrained(base(args)), adapters, tokens, head)
        numbers["share"] = work * rate / STEP_SIZE / args.results["card"]["matmul"]
        text += f", {numbers['share']:.0%} of the matrix-product rate"
    text += f", peak {numbers['peak_gb']:.1f} GB; {BOOK_STEPS:,} steps in {numbers['book_seconds']:.0f} s"
    return {"text": f"{text}; loss {losses[0]:.2f} → {losses[-1]:.2f}", **numbers}


def resume(args, name: str) -> dict:
    """Killed after its first save and resumed; then compared with the run of the part tree_rows."""
    run, half = args.scratch / name, args.steps // 2
    shutil.rmtree(run, ignore_errors=True)
    command = start(args, train_command(args, run))
    try:
        while command.poll() is None and newest_state(run)[0] < half and time.time() < args.part_end:
            time.sleep(0.01)
    finally:
        end_process(command)
    if newest_state(run)[0] < half:
        raise UserError(f"no state was saved: {last_words(args)}")
    last = max(curve(run, "train_loss"))
    execute(args, train_command(args, run, "--resume"))
    if (end := max(curve(run, "train_loss"))) != args.steps:
        raise UserError(f"the resumed run ended at step {end} of {args.steps}")
    text = f"killed at step {last}, went on after {half}"
    if checkpoints(args.scratch / "tree_rows"):
        found, expected = last_adapter(run), last_adapter(args.scratch / "tree_rows")
        trained = {name: tensor.float() for name, tensor in expected.items() if "lora_B" in name}  # A hardly moves
        difference = shared.relative_difference(found, trained)
        text += f"; B of the adapters differ from an uninterrupted run's by {difference:.1e}"
        if not difference < 0.3:  # on a GPU sums come in any order; another course would give 1 and more
            raise UserError(text)
    return {"text": text}


# ---------------------------------------------------------------- running the parts


def start(args, command: list[str]) -> subprocess.Popen:
    """A process that writes to the log, and leads a group with all that it starts."""
    environment = {"CUDA_VISIBLE_DEVICES": "0", "PYTHONUNBUFFERED": "1", **os.environ}  # as in the chapter's line
    with open(args.out / "log.txt", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def end_process(process: subprocess.Popen):
    """End it and all that it has started, at once."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def execute(args, command: list[str]):
    """Run a command to its end. Raises: UserError with the last line of its error, also where it takes too long."""
    process = start(args, command)
    try:
        process.wait(max(1, args.part_end - time.time()))
    except subprocess.TimeoutExpired:
        raise UserError(f"did not end in time; its last words: {last_words(args)}") from None
    finally:
        end_process(process)
    code = process.returncode
    if code < 0 or 256 - code in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT):  # the latter by way of the launcher
        killed_by = signal.Signals(-code % 256).name  # as by the system, where memory ran out
        raise UserError(f"killed by {killed_by}; its last words: {last_words(args)}")
    if code:
        raise UserError(last_words(args))


def last_words(args) -> str:
    """The last line of this part's log that names an error, or its last line."""
    log = (args.out / "log.txt").read_text(encoding="utf-8", errors="replace")
    _, *lines = [line.strip() for line in re.split("[\r\n]", log.rpartition("──── ")[2]) if line.strip()]
    errors = [line for line in lines if re.match(r"(\[rank\d\]: )?(error:|[\w.]*(Error|Exception)\b)", line)]
    return (errors or lines or ["none"])[-1][:300]


def in_own_process(args, name: str) -> dict:
    more = ["--out", args.out, "--scratch", args.scratch, "--only", name]
    execute(args, [sys.executable, __file__, *args.argv, *map(str, more)])
    return json.loads((args.scratch / f"{name}.json").read_text(encoding="utf-8"))


def attempt(args, name: str) -> dict:
    """What became of a part, whatever that is."""
    begin, (needs, what) = time.time(), PARTS[name]
    with open(args.out / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n──── {name}: {what}\n")
    patience = 3 if args.size == "7b" else 30  # a CPU with a tiny model spends its time at starting
    args.part_end = min(args.end, begin + patience * needs)
    try:
        if args.end - begin < needs:
            return {"status": "skipped", "text": f"does not fit into --seconds {args.seconds} any more", "seconds": 0}
        kind = training if name in TRAINING else resume if name == "resume" else in_own_process
        found = {"status": "ok", **kind(args, name)}
    except Exception as error:  # any, so that the other parts go on
        told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
        found = {"status": "FAILED", "text": told}
    return found | {"seconds": time.time() - begin}


def write(args) -> str:
    rows = [["part", "", "s", "result"]]
    for name, found in args.results.items():
        rows.append([name, found["status"], f"{found['seconds']:.0f}", found["text"].replace("|", "/")])
    table = "\n".join(markdown(rows)) + "\n"
    (args.out / "table.md").write_text(table, encoding="utf-8")
    everything = {"arguments": args.argv, "parts": args.results}
    (args.out / "gpu_check.json").write_text(json.dumps(everything, ensure_ascii=False, indent=1), encoding="utf-8")
    return table


@entry_point
def main(argv=None):
    args = parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.only:
        found = getattr(gpu_parts, args.only)(args)
        (args.scratch / f"{args.only}.json").write_text(json.dumps(found), encoding="utf-8")
        return
    if args.size == "7b" and pick_device("auto").type == "cpu":
        raise UserError("--size 7b: there is no GPU here: give --size tiny to see that everything runs")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "log.txt").write_bytes(b"")
    args.end, args.results = time.time() + args.seconds, {}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as temporary:
        args.scratch = args.scratch or Path(temporary)
        args.scratch.mkdir(parents=True, exist_ok=True)
        if args.size == "7b" and shutil.disk_usage(args.scratch).free < 36e9:
            raise UserError(f"{args.scratch}: less than 36 GB are free: name another directory with --scratch")
        for name in args.parts:
            args.results[name] = attempt(args, name)
            table = write(args)
            print("{}: {status}, {seconds:.0f} s: {text}".format(name, **args.results[name]), flush=True)
    print(f"\n{table}")
    if any(found["status"] == "FAILED" for found in args.results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no part outlives this process
    main()
