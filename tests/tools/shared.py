"""What several tools share: samples, random models, time, and how far numbers differ."""

import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.benchmark import Timer

import data_helper
import utils
from baichuan import BaichuanConfig, BaichuanForCausalLM
from support.model import stand_in
from support.training.fused_lora import fuse

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data/sample"
SIZES = {  # hidden, layers, heads, intermediate
    "tiny": (128, 4, 4, 384),
    "small": (768, 6, 12, 2048),
    "wide": (4096, 2, 32, 11_008),
    "7b": (4096, 32, 32, 11_008),
}


def write_samples(directory, data_dir=SAMPLE) -> tuple[str, str]:
    """train.json and test.json, of all five roles where it is the project's own sample."""
    train, test = f"{directory}/train.json", f"{directory}/test.json"
    roles = ["--roles", "all"] if Path(data_dir) == SAMPLE else []
    data_helper.main(["--data_dir", str(data_dir), "--train_path", train, "--test_path", test, *roles])
    return train, test


def write_model(directory, *flags) -> str:
    """The directory of a stand-in with random weights; `flags` are those of support.model.stand_in."""
    train, _ = write_samples(directory)
    model = f"{directory}/model"
    stand_in.main(["--save_dir", model, "--train_path", train, "--steps", "0", *map(str, flags)])
    return model


def random_model(size: str, dtype: torch.dtype, device, vocab_size: int = 125_696, **changes) -> BaichuanForCausalLM:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = BaichuanConfig(vocab_size=vocab_size, **dict(zip(names, SIZES[size])) | changes)
    torch.manual_seed(0)
    with torch.device(device):
        return BaichuanForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def with_lora(model, spread=0.01, dropout=0.0):
    """Adapters with the book's rank and scale. With a B of 0 the model computes what it did."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = utils.find_all_linear_names(model)
    lora = LoraConfig(r=16, lora_alpha=64, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    if isinstance(model, BaichuanForCausalLM):
        fuse(lora)  # as train.py does; a LLaMA for the Trainer has PEFT's own layers
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=spread)
    return model


def as_llama(model):
    """The same model as transformers' LlamaForCausalLM, mostly in the same memory."""
    from transformers import LlamaForCausalLM

    from baichuan import llama_export

    model.config.merged_adapter = None
    config = llama_export.llama_config(model.config)
    with torch.device("meta"):
        llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(dict(llama_export.llama_tensors(model.state_dict().items())), assign=True)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config).to(model.device)  # has a buffer that no file holds
    return llama


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def stopwatch(device):
    """Its `seconds` are known once the block is left and the device has done what it was given."""
    watch = SimpleNamespace()
    synchronize(device)
    start = time.perf_counter()
    yield watch
    synchronize(device)
    watch.seconds = time.perf_counter() - start


def median_seconds(statement: str, **variables) -> float:
    """Of one execution, after some that warm up."""
    timer = Timer(statement, globals=variables, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median


def matmul_rate(device, dtype) -> float:
    """FLOP a second of a large matrix product on random data."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / median_seconds("a @ b", a=a, b=b)


def arithmetic(config, adapters: int, tokens: float, head_positions: float) -> float:
    """FLOP of a step's matrix products with a frozen base: 2 a weight forward, 2 backward to the activations."""
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    return tokens * (4 * config.num_hidden_layers * layer + 6 * adapters) + 4 * head_positions * head


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    difference = sum((found[name] - expected[name]).pow(2).sum().item() for name in expected)
    return (difference / sum(tensor.pow(2).sum().item() for tensor in expected.values())) ** 0.5


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_header(*cells):
    print_row(*cells)
    print_row(*["---"] * len(cells))
