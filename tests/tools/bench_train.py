"""How fast a training step is, beside the padded step of the book and beside transformers' Trainer with PEFT.

    python3 tests/tools/bench_train.py --size small                     # two CPU cores: some fifteen minutes
    python3 tests/tools/bench_train.py --size small --conversations     # conversations of 3 and 4 rounds
    python3 tests/tools/bench_train.py --size tiny --growth             # how their cost grows with rounds and persona
    python3 tests/tools/bench_train.py --scale 1000000                  # a million samples: time and memory of the data
    python3 tests/tools/bench_train.py --size 7b --dtype bfloat16       # on a GPU
    python3 tests/tools/bench_train.py --operations                     # those of one step, counted on the CPU

Weights are random, samples are RoleBench's (--data_dir, with --tokenizer_dir) or this project's own. All ways take
the same samples in a step and divide the loss by the same tokens; runs alternate, and medians are printed. The ways:

book              padded rows, head and logits at every position
padded            the same rows, the head at supervised positions alone
tree              rows of trees, as train.py takes them
trainer           transformers' Trainer + PEFT on the equivalent LLaMA, padded rows
padded-rounds, trainer-rounds   of conversations: one sample a round, with the history before it
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import data_helper  # noqa: E402 - the scripts lie in the root
import train  # noqa: E402
import utils  # noqa: E402
from baichuan import BaichuanConfig, BaichuanForCausalLM  # noqa: E402
from support.device import row_cost  # noqa: E402
from support.dialogues.samples import read_samples  # noqa: E402
from support.model import stand_in  # noqa: E402
from support.model.directory import ModelDirectory  # noqa: E402

SIZES = {  # hidden, layers, heads, intermediate
    "tiny": (128, 4, 4, 352),
    "small": (768, 6, 12, 2048),
    "deep": (512, 16, 8, 1408),
    "wide": (4096, 2, 32, 11_008),
    "7b": (4096, 32, 32, 11_008),
}
BOOK_EPOCH = 8020  # samples


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--data_dir", default=str(ROOT / "data/sample"), help="RoleBench files")
    parser.add_argument("--tokenizer_dir", help="directory with tokenizer.model; default: one trained on --data_dir")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 32, 64], help="samples a step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each way, after the untimed gradients")
    parser.add_argument("--ways", nargs="+", help="ways to measure; default: all that fit the samples")
    parser.add_argument(
        "--conversations",
        nargs="?",
        const="",
        metavar="FILE",
        help="take conversations; without a FILE, a role's questions in RoleBench, three and four in a row",
    )
    parser.add_argument("--persona_tokens", type=int, default=400, help="tokens of a conversation's persona")
    parser.add_argument("--max_pack_len", type=int, default=8192)
    parser.add_argument("--attn_implementation", default="sdpa", choices=["sdpa", "flex_attention", "eager"])
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers of tree and padded")
    parser.add_argument("--growth", action="store_true", help="print the table of growth instead")
    parser.add_argument("--operations", action="store_true", help="count the operations of a step instead")
    parser.add_argument("--scale", type=int, metavar="SAMPLES", help="measure the data of this many samples instead")
    return parser.parse_args()


# ---------------------------------------------------------------- data and models


def load_data(args, directory: Path):
    train_path = directory / "train.json"
    paths = ["--train_path", str(train_path), "--test_path", str(directory / "test.json")]
    roles = [] if args.tokenizer_dir else ["--roles", "all"]
    data_helper.main(["--data_dir", args.data_dir, *paths, *roles])
    if not args.tokenizer_dir:
        args.tokenizer_dir = str(directory / "model")
        stand_in.main(["--save_dir", args.tokenizer_dir, "--train_path", str(train_path), "--steps", "0"])
    return train_path, ModelDirectory(args.tokenizer_dir).tokenizer


def chained(samples: list[dict], rounds: list[int]) -> list[dict]:
    """Conversations made of a role's questions in a row; their numbers of rounds are those of `rounds`, in turn."""
    conversations = []
    for role in dict.fromkeys(sample["role"] for sample in samples):
        own = iter([sample for sample in samples if sample["role"] == role])
        for number in itertools.cycle(rounds):
            taken = list(itertools.islice(own, number))
            if len(taken) < number:
                break
            messages = [message for sample in taken for message in sample["messages"]]
            conversations.append({"role": role, "system": taken[0]["system"], "messages": messages})
    return conversations


class Samples:
    """What is trained, whole and as one sample a round."""

    def __init__(self, samples: list[dict], tokenizer, persona_tokens: int | None = None):
        if persona_tokens:  # personas repeated up to this length
            systems = {sample["system"] for sample in samples}
            longer = {s: tokenizer.decode((tokenizer.text_to_ids(s) * 200)[:persona_tokens]) for s in systems}
            samples = [{**sample, "system": longer[sample["system"]]} for sample in samples]
        rounds, self.rounds_of = [], []
        for sample in samples:
            ends = [
                number for number, message in enumerate(sample["messages"], start=1) if message["role"] == "assistant"
            ]
            self.rounds_of.append(range(len(rounds), len(rounds) + len(ends)))
            for end in ends:
                read = [{**message, "train": False} for message in sample["messages"][: end - 1]]
                rounds.append({**sample, "messages": [*read, sample["messages"][end - 1]]})
        self.whole, self.rounds = (utils.RoleDataset(part, tokenizer, 4096, 4096) for part in (samples, rounds))

    def of(self, way: str, indices: np.ndarray) -> tuple[utils.RoleDataset, np.ndarray]:
        """The data set that a way reads, and where the samples of a step are in it."""
        if not way.endswith("-rounds"):
            return self.whole, indices
        return self.rounds, np.array([number for index in indices for number in self.rounds_of[index]])

    def __len__(self) -> int:
        return len(self.whole)


def load_samples(args, directory: Path) -> Samples:
    path, tokenizer = load_data(args, directory)
    if args.conversations is None:
        data = utils.RoleDataset(read_samples(path), tokenizer, 512, 256, is_skip=True)  # as the book
        kept = set(data.numbers)
        samples = [s for number, s in enumerate(read_samples(path), start=1) if number in kept]
        return Samples(samples, tokenizer)
    if args.conversations:
        return Samples(list(read_samples(args.conversations)), tokenizer, args.persona_tokens)
    return Samples(chained(list(read_samples(path)), [3, 4]), tokenizer, args.persona_tokens)


def random_model(size: str, dtype: torch.dtype, device, attn_implementation: str, vocab_size: int = 125_696):
    hidden, layers, heads, intermediate = SIZES[size]
    config = BaichuanConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = BaichuanForCausalLM._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    return model.eval()


def with_lora(model, targets):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(r=16, lora_alpha=64, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # B starts at zero, and with it the gradient of A; compare something
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def equivalent_llama(model):
    """The same model for transformers' Trainer: W_pack split into q, k, v with its adapter, the head normalised."""
    from transformers import LlamaConfig, LlamaForCausalLM

    base, config = model.get_base_model(), model.config
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    llama_config = LlamaConfig(
        **{name: getattr(config, name) for name in sizes},
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=4096,
    )
    with torch.device(base.device):
        llama = LlamaForCausalLM._from_config(llama_config, dtype=base.dtype, attn_implementation="sdpa")
    llama = with_lora(llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    state = {}
    for name, tensor in model.state_dict().items():
        if "W_pack" in name:
            parts = [tensor] * 3 if "lora_A" in name else tensor.chunk(3)
            state |= {name.replace("W_pack", f"{letter}_proj"): part for letter, part in zip("qkv", parts)}
        else:
            state[name] = F.normalize(tensor.float(), dim=-1).to(tensor) if name.endswith("lm_head.weight") else tensor
    llama.load_state_dict(state)
    return llama


# ---------------------------------------------------------------- the ways to take a step


def book_loss(model, batch, tokens: int) -> torch.Tensor:
    """Logits at every position, and the head normalised in every pass, as the published model's code has it."""
    base = model.get_base_model()
    hidden = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
    logits = F.linear(hidden, F.normalize(base.lm_head.weight, dim=-1)).float()
    labels = torch.full((batch["input_ids"].numel(),), -100, device=hidden.device)
    labels[batch["loss_positions"][:, 0]] = batch["loss_positions"][:, 1]
    return F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum", ignore_index=-100) / tokens


class OwnSteps:
    """Steps of one way through DeepSpeed, as train.py takes them."""

    def __init__(self, way: str, model, engine, args, device):
        self.way, self.model, self.engine, self.args, self.device = way, model, engine, args, device

    def batches(self, data, indices):
        packing = "tree" if self.way == "tree" else "none"
        collator = utils.Collator(data, packing, self.args.max_pack_len, 2, row_cost(self.model.config, self.device))
        return collator(data.in_tree_order(indices) if packing == "tree" else indices)

    def loss(self, module, batch, tokens):
        inputs = utils.model_inputs(batch, self.device, self.args.attn_implementation)
        if self.way == "book":
            return book_loss(self.model, inputs, tokens)
        return module(**inputs, use_cache=False, num_items_in_batch=tokens).loss

    def gradients(self, data, indices) -> dict[str, torch.Tensor]:
        self.model.zero_grad()
        for batch in self.batches(data, indices):
            self.loss(self.model, batch, int(data.supervised[indices].sum())).backward()
        found = {name: p.grad.float().clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return found

    def step(self, data, indices) -> tuple[float, int]:
        """Take one step: (seconds, tokens computed)."""
        synchronize(self.device)
        start = time.perf_counter()
        batches, tokens = self.batches(data, indices), int(data.supervised[indices].sum())
        with self.engine.coalesce_grad_reduction():
            for batch in batches:
                self.engine.backward(self.loss(self.engine, batch, tokens))
        self.engine.step()
        synchronize(self.device)
        return time.perf_counter() - start, sum(batch["input_ids"].numel() for batch in batches)


class TrainerSteps:
    """Steps of transformers' Trainer, timed by its own callbacks."""

    def __init__(self, model, args, device, directory: Path):
        self.model, self.args, self.device, self.directory = model, args, device, directory

    def run(self, data, indices, steps: int):
        from transformers import Trainer, TrainerCallback, TrainingArguments

        times, gradients, device = [], {}, self.device

        class Watch(TrainerCallback):
            def on_step_begin(self, *_, **__):
                synchronize(device)
                self.start = time.perf_counter()

            def on_pre_optimizer_step(self, *_, model, **__):
                gradients.update((n, p.grad.float().clone()) for n, p in model.named_parameters() if p.grad is not None)
                times.append(time.perf_counter() - self.start)  # replaced below; a failing step still shows

            def on_optimizer_step(self, *_, **__):
                synchronize(device)
                times[-1] = time.perf_counter() - self.start

        class InOrder(Trainer):
            def _get_train_sampler(self, *_):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        def sample(index):
            ids, pairs = data.sample(index)
            ids = torch.from_numpy(np.append(ids, data.eos))
            labels = torch.full_like(ids, -100)
            labels[pairs[:, 0] + 1] = torch.from_numpy(pairs[:, 1])
            return {"input_ids": ids, "labels": labels}

        def collate(rows):
            pad = torch.nn.utils.rnn.pad_sequence
            ids = pad([row["input_ids"] for row in rows], batch_first=True)
            labels = pad([row["labels"] for row in rows], batch_first=True, padding_value=-100)
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            return {
                "input_ids": ids,
                "labels": labels,
                "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]),
            }

        arguments = TrainingArguments(
            output_dir=str(self.directory / "trainer"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=-(-len(indices) // 2),
            max_steps=steps,
            learning_rate=0.0,  # its weights stay comparable from one size to the next
            max_grad_norm=0.0,
            bf16=self.args.dtype == "bfloat16" and self.device.type == "cuda",
            use_cpu=self.device.type == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        rows = [sample(index) for index in indices] * steps
        trainer = InOrder(self.model, arguments, collate, rows, callbacks=[Watch()])
        trainer.train()
        tokens = sum(max(len(r["input_ids"]) for r in rows[i : i + 2]) * 2 for i in range(0, len(indices), 2))
        return times[-1], tokens, gradients

    def gradients(self, data, indices):
        found = self.run(data, indices, 1)[2]
        merged = {}
        for name, gradient in found.items():  # the adapter of W_pack: A is shared by q, k and v, B is stacked
            if "q_proj" not in name and "k_proj" not in name and "v_proj" not in name:
                merged[name] = gradient
            elif "q_proj" in name:
                parts = [found[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                merged[name.replace("q_proj", "W_pack")] = sum(parts) if "lora_A" in name else torch.cat(parts)
        return merged

    def step(self, data, indices):
        return self.run(data, indices, 1)[:2]


# ---------------------------------------------------------------- measuring


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory begins anew


def peak_gib(device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def matmul_rate(device, dtype) -> float:
    """FLOP a second of a large matrix product on random data."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[2:])


def arithmetic(config, adapters: int, tokens: float, head_positions: float) -> float:
    """FLOP of a step's matrix products with a frozen base: 2 a weight forward, 2 backward to the activations."""
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    return tokens * (4 * config.num_hidden_layers * layer + 6 * adapters) + 4 * head_positions * (
        config.vocab_size * config.hidden_size
    )


def relative_difference(found, expected) -> float:
    difference = sum((found[name] - expected[name]).pow(2).sum().item() for name in expected)
    return (difference / sum(tensor.pow(2).sum().item() for tensor in expected.values())) ** 0.5


def table(args):
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        data = load_samples(args, directory)
        device, dtype = train.processes.join_processes(), getattr(torch, args.dtype)
        launched = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        # … or Trainer would wrap its model for several processes; DeepSpeed gets them back below.
        rate = matmul_rate(device, dtype)
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        print(
            f"{name}, {args.dtype}, {rate / 1e12:.3f} TFLOP/s in a matrix product; size {args.size}: hidden, layers, "
            f"heads, intermediate {SIZES[args.size]}; {len(data):,} samples"
        )
        model = with_lora(
            random_model(args.size, dtype, device, args.attn_implementation),
            ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"],
        )
        adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rounds = ["padded-rounds", "padded", "tree", "trainer-rounds", "trainer"]
        names = args.ways or (["book", "padded", "tree", "trainer"] if args.conversations is None else rounds)
        llama = equivalent_llama(model) if any(way.startswith("trainer") for way in names) else None
        ways = {
            way: TrainerSteps(llama, args, device, directory)
            if way.startswith("trainer")
            else OwnSteps(way, model, None, args, device)
            for way in names
        }
        draw = np.random.default_rng(0)
        steps = {size: [draw.permutation(len(data))[:size] for _ in range(args.steps)] for size in args.samples}
        differences = {}
        for size in args.samples:
            found = {way: ways[way].gradients(*data.of(way, steps[size][0])) for way in names}
            reference = found[names[0]]
            differences |= {(size, way): relative_difference(found[way], reference) for way in ways}
        if args.compile:
            for layer in model.get_base_model().model.layers:
                layer.compile(dynamic=True)
        flags = train.parse_args(["--ds_file", str(ROOT / "ds_zero2_no_offload.json")])
        config = train.read_deepspeed_config(flags.ds_file) | {"bf16": {"enabled": args.dtype == "bfloat16"}}
        os.environ.update(launched)
        engine = train.start_engine(model, config, flags, 10_000)
        for name in launched:
            del os.environ[name]
        print(
            "\n| samples a step | way | samples/s | ratio | tokens/sample | supervised tokens/s | peak GiB | gradient difference | share of matrix rate |"
            + (" epoch of 8,020, s |" if device.type == "cuda" else "")
        )
        print("|---" * (10 if device.type == "cuda" else 9) + "|")
        for size in args.samples:
            measured = {way: [] for way in ways}
            memory = {}
            for indices in steps[size]:
                for way, steps_of in ways.items():
                    if isinstance(steps_of, OwnSteps):
                        steps_of.engine = engine
                    reset_peak(device)
                    measured[way].append(
                        (*steps_of.step(*data.of(way, indices)), int(data.whole.supervised[indices].sum()))
                    )
                    memory[way] = max(memory.get(way, 0), peak_gib(device))
            seconds = {way: statistics.median(s for s, *_ in runs) for way, runs in measured.items()}
            slowest = seconds[names[0]]
            for way, runs in measured.items():
                tokens = statistics.mean(tokens for _, tokens, _ in runs)
                supervised = statistics.mean(supervised for *_, supervised in runs)
                head = tokens if way == "book" or way.startswith("trainer") else supervised
                share = arithmetic(model.config, adapters, tokens, head) / seconds[way] / rate
                row = [size, way, f"{size / seconds[way]:.2f}", f"{slowest / seconds[way]:.2f}", f"{tokens / size:.1f}"]
                row += [
                    f"{supervised / seconds[way]:.0f}",
                    f"{memory[way]:.2f}",
                    f"{differences[size, way]:.1e}",
                    f"{share:.0%}",
                ]
                row += [f"{seconds[way] * BOOK_EPOCH / size:.0f}"] if device.type == "cuda" else []
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


def growth(args):
    """Milliseconds a conversation, over its rounds and the tokens of its persona, eight conversations a step."""
    ways = args.ways or ["padded-rounds", "padded", "tree"]
    with tempfile.TemporaryDirectory() as directory:
        path, tokenizer = load_data(args, Path(directory))
        samples = list(read_samples(path))
        device = train.processes.join_processes()
        model = random_model(args.size, torch.float32, device, "sdpa", len(tokenizer))
        model = with_lora(model, utils.find_all_linear_names(model))
        print(
            f"\n| persona tokens | rounds | {' | '.join(f'{way}, ms | tokens' for way in ways)} |"
            + "\n|---|---"
            + "|---" * 2 * len(ways)
            + "|"
        )
        for persona, rounds in itertools.product((50, 200, 800), (1, 2, 4, 8, 16)):
            data = Samples(chained(samples, [rounds]), tokenizer, persona)
            row = [persona, rounds]
            for way in ways:
                steps_of, seconds, tokens = OwnSteps(way, model, None, args, device), [], []
                for number in range(args.steps + 1):
                    taken = data.of(way, np.random.default_rng(number).permutation(len(data))[:8])
                    start = time.perf_counter()
                    steps_of.gradients(*taken)
                    seconds.append(time.perf_counter() - start)
                    tokens.append(sum(batch["input_ids"].numel() for batch in steps_of.batches(*taken)))
                row += [f"{statistics.median(seconds[1:]) / 8 * 1000:.1f}", f"{statistics.mean(tokens[1:]) / 8:.0f}"]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


def scale(args):
    """Tokenize and collate many samples: RoleBench repeated with a changed word in each."""
    with tempfile.TemporaryDirectory() as directory:
        path, tokenizer = load_data(args, Path(directory))
        lines = list(read_samples(path))
        many = Path(directory) / "many.json"
        with open(many, "w", encoding="utf-8") as file:
            for number in range(args.scale):
                sample = lines[number % len(lines)]
                question, answer = (turn["content"] for turn in sample["messages"])
                changed = {
                    "system": sample["system"],
                    "prompt": f"{number}、{question}",
                    "response": f"{answer}{number}",
                }
                file.write(json.dumps(changed, ensure_ascii=False) + "\n")
        del lines
        reset_peak(torch.device("cpu"))
        before, start = peak_gib(torch.device("cpu")), time.perf_counter()
        data = utils.RoleDataset(read_samples(many), tokenizer, 512, 256)
        tokenized = time.perf_counter() - start
        steps = utils.Steps(data, utils.Collator(data, "tree", 2048, 2), 8, 1, 0)
        start = time.perf_counter()
        for step in range(1000):
            steps[step]
        collated = time.perf_counter() - start
        used = peak_gib(torch.device("cpu")) - before
        print(
            f"{len(data):,} samples, {len(data.ids):,} tokens: tokenized in {tokenized:.1f} s; 1,000 steps collated in "
            f"{collated:.1f} s; {used:.2f} GiB more memory at the peak ({os.cpu_count()} cores)"
        )


# ---------------------------------------------------------------- counting

# Views, and memory that is only allocated or looked at: no work for a GPU.
NO_WORK = "view _unsafe_view reshape _reshape_alias as_strided expand permute transpose t unbind select slice narrow "
NO_WORK += "split split_with_sizes chunk flatten unsqueeze squeeze detach detach_ alias view_as to lift_fresh set_ "
NO_WORK += (
    "empty empty_like empty_strided resize_ result_type resolve_conj resolve_neg _has_compatible_shallow_copy_type"
)
NO_WORK = {"detach", "detach_", *(f"aten::{name}" for name in NO_WORK.split())}
# What a GPU has one kernel for, and one for its gradient, whatever the CPU makes of it …
FUSED = {f"aten::{name}" for name in ("rms_norm", "dropout", "cross_entropy_loss")}
FUSED |= {"aten::_scaled_dot_product_flash_attention_for_cpu"}
# … and what converts a number on the CPU on its way.
SINGLE = {f"aten::{name}" for name in ("mul", "mul_", "add", "add_", "div", "div_", "pow", "sum", "mean")}


def count_operations(step: Callable) -> Counter:
    """{(part, operation): times} of a training step: operations that compute and call none that does.

    Each is a launch on a GPU, and launches are what the time of a step of few tokens is made of. Parts are the names
    given to `torch.profiler.record_function`, and "backward" wherever autograd computes.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    found, fused = Counter(), {}  # autograd's number of each operation inside a fused one → the latter
    counted = set()  # fused operations, once the gradient of one is met

    def numbers(event):
        return {event.sequence_nr} | {number for child in event.cpu_children for number in numbers(child)}

    def visit(event, part: str) -> bool:
        """Count an event with those it calls; whether any of them computes."""
        part = event.name if event.is_user_annotation else part
        if event.name.startswith("autograd::engine::evaluate_function"):
            part = "backward"
            if event.sequence_nr in fused:
                kernel, first = fused[event.sequence_nr]
                found[part, f"{kernel} backward"] += (kernel, first) not in counted
                counted.add((kernel, first))
                # The sum of the gradients of a tensor that is used twice is no part of the kernel.
                found[part, "aten::add_"] += sum(child.name == "aten::add_" for child in event.cpu_children)
                return True
        elif event.name in FUSED:
            inside = numbers(event) - {-1}
            fused.update(dict.fromkeys(inside, (event.name, min(inside, default=-1))))
        inner = [] if event.name in FUSED | SINGLE else [visit(child, part) for child in event.cpu_children]
        works = not any(inner) and event.name.startswith("aten::") and event.name not in NO_WORK
        found[part, event.name] += works
        return works or any(inner)

    for event in profile.events():
        if event.cpu_parent is None:
            visit(event, "elsewhere")
    return +found


def operations_of_a_step(layers: int, directory: Path) -> Counter:
    """Of train.py's own step: the book's flags, small widths, 8 samples in one row, in bfloat16."""
    directory.mkdir(exist_ok=True)
    train_path, test_path, model_path = (str(directory / name) for name in ("train.json", "test.json", "model"))
    paths = ["--train_path", train_path, "--test_path", test_path]
    data_helper.main(["--data_dir", str(ROOT / "data/sample"), "--roles", "all", *paths])
    sizes = ["--hidden_size", "64", "--num_hidden_layers", str(layers), "--vocab_size", "2000", "--steps", "0"]
    stand_in.main(["--save_dir", model_path, "--train_path", train_path, *sizes])
    flags = ["--model_name_or_path", model_path, "--output_dir", str(directory / "run"), "--max_pack_len", "4096"]
    with mock.patch.object(train, "row_cost", lambda config, device: None):  # as few rows as possible
        step, steps = training_step([*paths, *flags])
    assert len(steps[0][0]) == 1
    step(0)  # the first one also makes the optimizer's state
    return count_operations(lambda: step(0))


def training_step(flags: list[str]) -> tuple[Callable[[int], None], utils.Steps]:
    """(a function that takes step number k as train.py does, the steps), of train.py with these flags, in bfloat16."""
    args = train.parse_args([*flags, "--ds_file", str(ROOT / "ds_zero2_no_offload.json")])
    model_directory, config, train_data, test_data, _ = train.read_inputs(args)
    device = train.processes.join_processes()
    model = train.model_with_adapters(args, model_directory, torch.bfloat16)
    steps, _ = train.lay_out(args, model_directory.config, device, train_data, test_data)
    engine = train.start_engine(model, config, args, len(steps))
    engine.train()

    def step(number: int):
        batches, tokens = steps[number]
        with torch.profiler.record_function("forward and reduction"):
            train.train_step(engine, batches, tokens, args.attn_implementation, stop=False)
        with torch.profiler.record_function("engine.step()"):
            train.update(engine, torch.bfloat16)

    return step, steps


def operations(args):
    with tempfile.TemporaryDirectory() as directory:
        found = operations_of_a_step(32, Path(directory))
    print(f"{found.total():,} operations in a step of 8 samples through 32 layers")
    for part in dict.fromkeys(part for part, _ in found):
        here = Counter({name: times for (where, name), times in found.items() if where == part})
        print(f"\n{part}: {here.total():,}")
        for name, times in here.most_common():
            print(f"{times:8,}  {name.removeprefix('aten::')}")


if __name__ == "__main__":
    arguments = parse_args()
    kinds = {"operations": operations, "growth": growth, "scale": scale}
    chosen = next((measure for name, measure in kinds.items() if getattr(arguments, name)), table)
    chosen(arguments)
