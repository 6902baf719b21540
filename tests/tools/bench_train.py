"""How fast a training step is, beside the padded step of the book and beside transformers' Trainer with PEFT.

    python3 tests/tools/bench_train.py --size small                     # two CPU cores: some fifteen minutes
    python3 tests/tools/bench_train.py --size small --conversations     # conversations of 3 and 4 rounds
    python3 tests/tools/bench_train.py --size tiny --growth             # how their cost grows with rounds and persona
    python3 tests/tools/bench_train.py --scale 1000000                  # a million samples: time and memory of the data
    python3 tests/tools/bench_train.py --size 7b --dtype bfloat16 --checkpointing    # on a GPU
    python3 tests/tools/bench_train.py --roofline                       # a step of the 7B model on four cards, computed

Weights are random, samples are RoleBench's (--data_dir, with --tokenizer_dir) or this project's own. All ways take
the same samples in a step and compute the same loss; they take turns, and medians are printed. The ways:

book              padded rows, head and logits at every position
padded            the same rows, the head at supervised positions alone
tree              rows of trees, as train.py takes them
trainer           transformers' Trainer + PEFT on the equivalent LLaMA, padded rows
…-checkpointing   the same with gradient checkpointing
padded-rounds, trainer-rounds   of conversations: one sample a round, with the history before it
"""

import argparse
import json
import os
import statistics
import sys
from itertools import cycle, islice, product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
import utils
from baichuan import BaichuanConfig
from support.device import MOST_TOKENS, row_cost
from support.dialogues.samples import read_samples
from support.model.directory import ModelDirectory
from support.training.trial import tokens
from tests.tools import shared
from tests.tools.roofline import print_tables
from tests.tools.steps import OwnSteps, TrainerSteps

SINGLE_WAYS = ["book", "padded", "tree", "trainer"]
CHECKPOINTING_WAYS = ["tree-checkpointing", "trainer-checkpointing"]
CONVERSATION_WAYS = ["padded-rounds", "padded", "tree", "trainer-rounds", "trainer"]
GROWTH_WAYS = ["padded-rounds", "padded", "tree"]
PERSONA_TOKENS = 400  # of a conversation


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=shared.SIZES, default="small")
    parser.add_argument("--data_dir", default=shared.SAMPLE, help="RoleBench files")
    parser.add_argument("--tokenizer_dir", help="directory with tokenizer.model; default: one trained on the sample")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 32, 64], help="samples a step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each way, after an untimed one")
    parser.add_argument("--conversations", action="store_true", help="a role's questions, three and four in a row")
    parser.add_argument("--checkpointing", action="store_true", help="also with gradient checkpointing")
    parser.add_argument("--growth", action="store_true", help="print the table of growth instead")
    parser.add_argument("--roofline", action="store_true", help="compute what a step takes on several cards instead")
    parser.add_argument("--scale", type=int, metavar="SAMPLES", help="measure the data of this many samples instead")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- samples


def load_samples(args, directory: str):
    """(the data's samples, their file, the tokenizer)."""
    tokenizer = ModelDirectory(args.tokenizer_dir or shared.write_model(directory)).tokenizer
    path, _ = shared.write_samples(directory, args.data_dir)
    return list(read_samples(path)), tokenizer


def chained(samples: list[dict], rounds: list[int]) -> list[dict]:
    """Conversations made of a role's questions in a row; their numbers of rounds are those of `rounds`, in turn."""
    conversations = []
    for role in dict.fromkeys(sample["role"] for sample in samples):
        own = iter([sample for sample in samples if sample["role"] == role])
        for number in cycle(rounds):
            taken = list(islice(own, number))
            if len(taken) < number:
                break
            messages = [message for sample in taken for message in sample["messages"]]
            conversations.append({"role": role, "system": taken[0]["system"], "messages": messages})
    return conversations


class Samples:
    """What is trained, whole and as one sample a round; with `persona_tokens`, personas are repeated up to these."""

    def __init__(self, samples: list[dict], tokenizer, persona_tokens: int | None = None):
        if persona_tokens:
            systems = {sample["system"] for sample in samples}
            longer = {s: tokenizer.decode((tokenizer.text_to_ids(s) * 200)[:persona_tokens]) for s in systems}
            samples = [{**sample, "system": longer[sample["system"]]} for sample in samples]
        rounds, self.rounds_of = [], []
        for sample in samples:
            first = len(rounds)
            for number, message in enumerate(sample["messages"]):
                if message["role"] == "assistant":
                    read = [{**earlier, "train": False} for earlier in sample["messages"][:number]]
                    rounds.append({**sample, "messages": [*read, message]})
            self.rounds_of.append(range(first, len(rounds)))
        self.whole, self.rounds = (utils.RoleDataset(part, tokenizer, 4096, 4096) for part in (samples, rounds))

    def of(self, way: str, indices: np.ndarray) -> tuple[utils.RoleDataset, np.ndarray]:
        """The data set that a way reads, and where the samples of a step are in it."""
        if not way.endswith("-rounds"):
            return self.whole, indices
        return self.rounds, np.array([number for index in indices for number in self.rounds_of[index]])


def all_samples(args, directory: str) -> Samples:
    samples, tokenizer = load_samples(args, directory)
    if args.conversations:
        return Samples(chained(samples, [3, 4]), tokenizer, PERSONA_TOKENS)
    within_limits = utils.RoleDataset(samples, tokenizer, 512, 256, is_skip=True).numbers  # as the book, from 1
    return Samples([samples[number - 1] for number in within_limits], tokenizer)


def usual_step(data: utils.RoleDataset, size: int) -> tuple[np.ndarray, int]:
    """Of an epoch's steps the one whose tokens are nearest to the mean step's: (its samples, how many steps there are)."""
    cost = row_cost(BaichuanConfig(), torch.device("cuda"))
    trees, padded = (utils.Collator(data, packing, MOST_TOKENS, 2, cost) for packing in ("tree", "none"))
    order, sizes = utils.Steps(data, trees, size, 1, 1234).order, []
    for drawn in order:
        rows = (trees(data.in_tree_order(drawn)), padded(drawn))
        sizes.append([*(sum(map(tokens, batches)) for batches in rows), int(data.supervised[drawn].sum())])
    nearest, mean = np.abs(sizes / np.mean(sizes, 0) - 1).sum(1).argmin(), np.mean(sizes, 0).round(1)
    print(f"{size} samples: {sizes[nearest]} tokens in trees, in padded rows, supervised; mean {mean}")
    return order[nearest], len(order)


# ---------------------------------------------------------------- the tables


def table(args) -> dict[tuple[int, str], float]:
    """Print the table. Returns {(samples a step, way): samples a second}."""
    with TemporaryDirectory() as directory:
        data = all_samples(args, directory)
        device, dtype = train.processes.join_processes(), getattr(torch, args.dtype)
        rate = shared.matmul_rate(device, dtype)
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        print(
            f"{name}, {args.dtype}, {rate / 1e12:.3f} TFLOP/s in a matrix product; size {args.size}: hidden, layers, "
            f"heads, intermediate {shared.SIZES[args.size]}; {len(data.whole):,} samples"
        )
        base = shared.random_model(args.size, dtype, device)
        llama = shared.with_lora(shared.as_llama(base), spread=0)
        model = shared.with_lora(base, spread=0).train()  # with a B of 0 both compute the same
        adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        flags = train.parse_args(["--ds_file", str(shared.ROOT / "ds_zero2_no_offload.json")])
        flags.learning_rate = 0.0  # and go on so
        config = train.read_deepspeed_config(flags.ds_file) | {"bf16": {"enabled": args.dtype == "bfloat16"}}
        engine = train.start_engine(model, config, flags, 10_000)
        names = CONVERSATION_WAYS if args.conversations else SINGLE_WAYS
        ways, rates = {}, {}
        for way in names + CHECKPOINTING_WAYS * args.checkpointing:
            trainer = way.startswith("trainer")
            ways[way] = TrainerSteps(way, llama, device, directory) if trainer else OwnSteps(way, model, device, engine)
        header = ("samples a step", "way", "samples/s", "ratio", "tokens/sample", "loss difference")
        shared.print_header(*header, "share of matrix rate")
        first, draw = next(iter(ways)), np.random.default_rng(0)
        for size in args.samples:
            steps = [draw.permutation(len(data.whole))[:size] for _ in range(args.steps)]
            runs = {way: [] for way in ways}
            for indices in [steps[0], *steps]:
                for way, own in ways.items():
                    runs[way].append(own.step(*data.of(way, indices)))
            supervised = statistics.mean(int(data.whole.supervised[indices].sum()) for indices in steps)
            medians = {way: statistics.median(seconds for seconds, *_ in found[1:]) for way, found in runs.items()}
            for way, found in runs.items():  # the first step of each warmed up
                tokens = statistics.mean(tokens for *_, tokens in found[1:])
                pairs = zip(found, runs[first])
                difference = max(abs(loss / expected - 1) for (_, loss, _), (_, expected, _) in pairs)
                head = tokens if way == "book" or way.startswith("trainer") else supervised
                share = shared.arithmetic(model.config, adapters, tokens, head) / medians[way] / rate
                ratio, computed = medians[first] / medians[way], f"{tokens / size:.1f}"
                rates[size, way] = size / medians[way]
                cells = [size, way, f"{rates[size, way]:.2f}", f"{ratio:.2f}", computed]
                shared.print_row(*cells, f"{difference:.1e}", f"{share:.0%}")
    return rates


def growth(args):
    """Milliseconds a conversation, over its rounds and the tokens of its persona, eight conversations a step."""
    with TemporaryDirectory() as directory:
        samples, tokenizer = load_samples(args, directory)
        device = train.processes.join_processes()
        model = shared.with_lora(shared.random_model(args.size, torch.float32, device, len(tokenizer)))
        header = ["persona tokens", "rounds", *(f"{way}, {what}" for way in GROWTH_WAYS for what in ("ms", "tokens"))]
        shared.print_header(*header)
        for persona, rounds in product((50, 200, 800), (1, 2, 4, 8, 16)):
            data = Samples(chained(samples, [rounds]), tokenizer, persona)
            cells = [persona, rounds]
            for way in GROWTH_WAYS:
                own, seconds, tokens = OwnSteps(way, model, device), [], []
                for number in range(args.steps + 1):
                    taken = data.of(way, np.random.default_rng(number).permutation(len(data.whole))[:8])
                    with shared.stopwatch(device) as watch:
                        _, computed = own.backward(*taken)
                    seconds.append(watch.seconds)
                    tokens.append(computed)
                cells += [f"{statistics.median(seconds[1:]) / 8 * 1000:.1f}", f"{statistics.mean(tokens[1:]) / 8:.0f}"]
            shared.print_row(*cells)


# ---------------------------------------------------------------- a million samples


def resident_gib(what: str) -> float:
    """VmRSS: now; VmHWM: at most since the last reset (Linux)."""
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) / 2**20


def scale(args):
    """Tokenize and collate many samples: RoleBench repeated with a changed word in each."""
    device = torch.device("cpu")
    with TemporaryDirectory() as directory:
        samples, tokenizer = load_samples(args, directory)
        many = Path(directory) / "many.json"
        with open(many, "w", encoding="utf-8") as file:
            for number in range(args.scale):
                sample = samples[number % len(samples)]
                question, answer = (turn["content"] for turn in sample["messages"])
                changed = {"prompt": f"{number}、{question}", "response": f"{answer}{number}"}
                file.write(json.dumps({"system": sample["system"], **changed}, ensure_ascii=False) + "\n")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = resident_gib("VmRSS")
        with shared.stopwatch(device) as tokenizing:
            data = utils.RoleDataset(read_samples(many), tokenizer, 512, 256)
        steps = utils.Steps(data, utils.Collator(data, "tree", 2048, 2), 8, 1, 0)
        with shared.stopwatch(device) as collating:
            for step in range(1000):
                steps[step]
        print(
            f"{len(data):,} samples, {len(data.ids):,} tokens: tokenized in {tokenizing.seconds:.1f} s; 1,000 steps "
            f"collated in {collating.seconds:.1f} s; {resident_gib('VmHWM') - before:.2f} GiB more memory at the peak "
            f"({os.cpu_count()} cores)"
        )


def main():
    args = parse_args()
    if args.roofline:
        with TemporaryDirectory() as directory:
            data = all_samples(args, directory).whole
        print_tables(data, {size: usual_step(data, size) for size in (8, 32)})
    elif args.scale:
        scale(args)
    elif args.growth:
        growth(args)
    else:
        table(args)


if __name__ == "__main__":
    main()
