"""Fold a LoRA adapter into the weights of its base model, and prove that the result is the model that was trained.

    python3 merge_params.py --ori_model_dir "Baichuan2-7B-Chat/" --model_dir "output_dir/epoch-1-step-1002" \\
        --save_model_dir "output_dir/epoch-1-step-1002-merge"

A LoRA layer computes W x + (alpha / r) B A x (Hu et al. 2021, arXiv 2106.09685), which is (W + (alpha / r) B A) x: one
matrix, as fast as the base's, and readable by programs that know nothing of adapters. `--format llama` writes the same
model as a plain LLaMA, for engines that do not know Baichuan (baichuan/llama_export.py).

The weights pass through memory one shard at a time. Then the result is compared with the base and its adapter, as PEFT
computes them: first weight by weight, then in its logits. Only one that agrees takes the name --save_model_dir.
"""

import gc
import math
import re
from copy import deepcopy
from pathlib import Path

from data_helper import persona
from support.command_line import ArgumentParser, integer
from support.dialogues.samples import as_sample, first_question, read_samples, with_system
from support.errors import Problems, UserError, blaming, entry_point, slow_imports
from support.files import followed, free_bytes, whole_directory


def parse_args(argv=None):
    parser = ArgumentParser(description="Fold a LoRA adapter into the weights of its base model, and compare the two.")
    add = parser.add_argument
    add("--ori_model_dir", type=Path, required=True, help="directory of the base model that the adapter was trained on")
    add("--model_dir", type=followed, required=True, help="directory of the adapter, such as output_dir/best")
    add("--save_model_dir", type=Path, required=True, help="directory for the merged model")
    formats = "llama: a plain LlamaForCausalLM with a tokenizer.json, which runs without the code of this project"
    add("--format", choices=("baichuan", "llama"), default="baichuan", help=formats)
    add("--device", default="cpu", help="where to compute: cpu (or -1), auto, or the number of a GPU")
    add("--overwrite", action="store_true", help="replace the model that --save_model_dir holds")
    add("--check_only", action="store_true", help="write nothing: compare --save_model_dir, in either format")
    add("--probe_path", type=Path, help="samples to compare on, such as data/test.json, instead of the built-in ones")
    add("--probes", type=integer(1), default=16, help="number of samples taken from --probe_path, evenly")
    return parser.parse_args(argv)


# After the arguments, since these take seconds.
with slow_imports(parse_args, __name__):
    import numpy as np
    import torch
    from peft.tuners.lora import LoraLayer
    from tqdm import tqdm
    from transformers import AutoTokenizer
    from transformers.dynamic_module_utils import custom_object_save

    from baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer, llama_export
    from baichuan.generation_utils import messages_to_ids
    from support.device import pick_device
    from support.model.adapter import Update, adapter_digest, load_adapter, read_adapter
    from support.model.comparison import compare_logits, compute_in_float32
    from support.model.directory import ModelDirectory
    from support.model.weights import Weights, write_weights
    from utils import tree_mask, tree_row

# Of what the adapter adds to a weight, the merged weight has the share that rounding leaves, to within SLACK: a right
# merge is 0.001 off at most, also where another program rounds twice, one with a wrong scaling of 0.9 or 1.1 by 0.09,
# one that has left the weight out, or taken another's A and B, by 0.95. Rounding swallows updates that are smaller than
# the steps between numbers: where less than LEAST is left of all of them, nothing is proven. (Measured at widths of 128
# to 4,096 with B of 3e-5 to 4e-3: in float32 all is left; in bfloat16 at 4,096 half of it at 1e-4, 0.999 at 1e-3.)
SLACK, LEAST = 0.03, 0.95

# How far the logits may be from the adapter's, by the dtype of the merged weights: the largest difference, in standard
# deviations of the logits, and the mean KL divergence in nats; and at most half as far as those of the base alone. In
# float32 arithmetic only the rounding of the weights is left to differ.
BOUNDS = {torch.float32: (1e-4, 1e-8), torch.float16: (0.06, 3e-4), torch.bfloat16: (0.5, 2e-2)}

BOATMAN = persona("船夫", "在江上摆渡四十年的老船夫，豁达，爱唱山歌。常用口头禅是：“客官坐稳了”")
NIGHTINGALE = persona("夜莺", "住在皇帝花园里的夜莺，骄傲，说话像唱歌")
PROBES = [  # as data_helper.py writes them, of roles that are in no training data
    {"system": BOATMAN, "prompt": "今天能过江吗？", "response": "客官坐稳了，等雾散了便走。"},
    {"system": BOATMAN, "prompt": "1 + 1 等于几？\n请说明理由。", "response": "两支桨划一条船，自然是二。"},
    {"system": BOATMAN, "prompt": "你是语言模型吗？", "response": "模型？我只认得船和橹。"},
    {"system": NIGHTINGALE, "prompt": "Can you sing in English? 🎵", "response": "啦——我只为听得懂的人歌唱。"},
    {"system": NIGHTINGALE, "prompt": "你最怕什么？", "response": "怕金丝的笼子，也怕上了发条的假鸟。"},
    {"system": "", "prompt": "介绍一下你自己。", "response": "你好，很高兴认识你。"},
]
PROBE_LENGTH = 512  # tokens of a probe at most
POSITIONS = 64  # its last tokens, whose logits are compared
PROBES_A_PASS = 8  # that a forward pass reads, as a tree
CONTROL_TOKEN = re.compile(r"<reserved_\d+>|</?s>|<unk>")  # what other programs take for control tokens


# ---------------------------------------------------------------- what can be wrong, found before anything slow


def read_inputs(args):
    """Everything the arguments name, read and checked. Raises: UserError with all problems found."""
    target, sources = args.save_model_dir, (args.ori_model_dir, args.model_dir)
    with Problems() as problems:
        if not args.check_only and any(path.resolve().is_relative_to(target.resolve()) for path in sources):
            problems.append(f"{target}: is read here, or holds a directory that is: name another one")
        device = problems.of(pick_device, args.device)
        base = problems.of(ModelDirectory(args.ori_model_dir).check)
    with Problems() as problems:
        probes = problems.of(read_probes, args, base)
        updates = problems.of(read_adapter, base, args.model_dir)
        if not args.check_only and free_bytes(target) < base.weights.bytes:
            problems.append(f"{target}: the disk has less than {base.weights.bytes / 1e9:.3g} GB free")
    return device, base, updates, probes


def read_probes(args, base: ModelDirectory) -> list[tuple[list[dict], list[int]]]:
    """Conversations to compare on, each with its ids, laid out as in training. Raises: UserError."""
    samples = list(read_samples(args.probe_path)) if args.probe_path else [as_sample(probe, "") for probe in PROBES]
    if not samples:
        raise UserError(f"--probe_path {args.probe_path}: holds no sample to compare on")
    probes = []
    for sample in samples[:: math.ceil(len(samples) / args.probes)]:
        messages = with_system(sample["system"], sample["messages"])
        probes.append((messages, messages_to_ids(base.tokenizer, messages)[:PROBE_LENGTH]))
    return probes


# ---------------------------------------------------------------- merging


def merged_tensors(weights: Weights, updates: dict[str, Update], device: torch.device):
    """Yield (name, W + scaling · B A), computed in float32 and rounded once, to the dtype of W."""
    for name, weight in tqdm(weights, "merging", len(weights.tensors), leave=False, delay=3):
        if name in updates:
            a, b = (factor.to(device).float() for factor in (updates[name].a, updates[name].b))
            wide = weight.to(device).to(torch.float32, copy=True)  # two bytes a number travel to a GPU
            merged = wide.addmm_(b, a, alpha=updates[name].scaling).to(weight.dtype)
            if not torch.stack(merged.aminmax()).isfinite().all():
                raise UserError(f"{name}: leaves the range of {weight.dtype} once merged: use a base in bfloat16")
            weight = merged.cpu()
        yield name, weight


def save_baichuan(directory: Path, config: BaichuanConfig, tokenizer: BaichuanTokenizer):
    """All but the weights, the model's code included, so that `trust_remote_code=True` loads the directory anywhere."""
    with torch.device("meta"):
        model = BaichuanForCausalLM(config)
    config.architectures = [type(model).__name__]
    config.auto_map = {}  # whatever code the base named, here it is this project's
    custom_object_save(model, directory, config=config)
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


# ---------------------------------------------------------------- the proof


def load_in_float32(directory: ModelDirectory, device: torch.device) -> torch.nn.Module:
    """A model of either format. On the CPU its parameters are the mapped files themselves, which nothing copies."""
    model = directory.load_mapped()
    compute_in_float32(model)
    return model.to(device)


@torch.no_grad()
def logits_of(model: torch.nn.Module, texts: list[list[int]], adapter_names=None) -> list[torch.Tensor]:
    """The logits at the last POSITIONS tokens of each text, (up to POSITIONS, V) in float32 on the CPU.

    What several texts begin with is computed once, as in training. With `adapter_names`, of a PEFT model, the tensors have
    a first dimension more, one row an adapter: so each weight is read and widened once for all of them.
    """
    all_logits, layers = [], model.get_decoder().layers
    options = {"adapter_names": adapter_names} if adapter_names else {}
    starts = range(0, len(texts), PROBES_A_PASS)
    with tqdm(total=len(starts) * len(layers), desc="comparing logits", leave=False, delay=3) as bar:

        def count(*_):  # returns None, since what a hook returns becomes the layer's output
            bar.update()

        hooks = [layer.register_forward_hook(count) for layer in layers]
        for start in starts:
            batch = texts[start : start + PROBES_A_PASS]
            last = [np.arange(len(ids))[-POSITIONS:] for ids in batch]
            row = tree_row([(np.array(ids), np.stack((columns, columns), 1)) for ids, columns in zip(batch, last)])
            row = {name: tensor.to(model.device) for name, tensor in row.items()}
            options |= {"position_ids": row["position_ids"], "attention_mask": tree_mask(row["end"])}
            options |= {"logits_to_keep": row["loss_positions"][:, 0], "use_cache": False}
            logits = model(row["input_ids"].expand(len(adapter_names or [""]), -1), **options).logits.float().cpu()
            all_logits += (logits if adapter_names else logits[0]).split([len(columns) for columns in last], dim=-2)
        for hook in hooks:
            hook.remove()
    return all_logits


def adapter_logits(base: ModelDirectory, adapter: Path, texts, device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The logits of the base with its adapter, which PEFT reads and applies, and of the base alone."""
    model = load_adapter(load_in_float32(base, device), adapter)
    logits = logits_of(model, texts, ["default", "__base__"])  # PEFT's names for the adapter, and for none
    return [both[0] for both in logits], [both[1] for both in logits]


def prove_layout(target: Path, merged: ModelDirectory, probes: list[tuple[list[dict], list[int]]]):
    """Compare what other programs make of a conversation, with the template and tokenizer as written, with what was trained.

    Raises: UserError: they differ. It names `target`, which `merged` will be called.
    """
    is_llama = merged.config.model_type == "llama"
    with blaming(f"{target}: its tokenizer or chat template cannot be used"):
        tokenizer = AutoTokenizer.from_pretrained(merged.path) if is_llama else merged.tokenizer
        template = (merged.path / "chat_template.jinja").read_text(encoding="utf-8")
        for messages, ids in probes:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
            # As such programs cut it: the markers that the template wrote are found in the text.
            their_ids = tokenizer.encode(text) if is_llama else tokenizer.sp_model.encode(text)
            # A text that spells a control token becomes that token there, and stays a text here.
            is_spelled = any(CONTROL_TOKEN.search(message["content"]) for message in messages)
            if their_ids[:PROBE_LENGTH] != ids and not is_spelled:
                raise ValueError(f"a conversation is not laid out as it was trained: {first_question(messages)!r}")


def gains(base: ModelDirectory, adapter: Path, merged: ModelDirectory, device) -> dict[str, torch.Tensor]:
    """{name of a merged weight W': three dot products with its update s·BA, as PEFT computes that}.

    They are of the gain W' − W, of the gain of a right merge, which is rounded to the dtype of W', and of s·BA itself.
    """
    layers = dict(load_adapter(base.load_mapped(), adapter).get_base_model().named_modules())
    as_written = llama_export.llama_tensors if merged.config.model_type == "llama" else iter
    after, products = dict(merged.weights), {}
    for name, weight in tqdm(base.weights, "comparing weights", len(base.weights.tensors), leave=False, delay=3):
        layer = layers[name.removesuffix(".weight")]
        if not isinstance(layer, LoraLayer):
            # The head counts by the direction of its rows: another program may have normalised it.
            if name != "lm_head.weight" and not torch.equal(weight.to(after[name].dtype), after[name]):
                raise ValueError(f"{name} has changed, and the adapter does not change it")
            continue
        for factor in (layer.lora_A, layer.lora_B):
            factor.to(device, torch.float32)
        update = layer.get_delta_weight("default")
        for (part, whole), (_, whole_update) in zip(as_written([(name, weight)]), as_written([(name, update)])):
            products[part] = torch.zeros(3, device=device)
            # Some rows at a time: what fits into the processor's cache is computed in a third of the time.
            pieces = (tensor.split(128) for tensor in (whole, whole_update, after[part]))
            for w, new, w_merged in zip(*pieces, strict=True):
                w, w_merged = w.to(device).float(), w_merged.to(device)
                w_right = (w + new).to(w_merged.dtype)
                products[part] += torch.stack([torch.sum(gain * new) for gain in (w_merged - w, w_right - w, new)])
            products[part] = products[part].cpu()
    return products


def prove_weights(args, base: ModelDirectory, merged: ModelDirectory, device: torch.device):
    """Has each weight gained its update? Raises: UserError: it has not, or rounding leaves too little of the updates."""
    with blaming(f"{args.save_model_dir}: is not this base with this adapter"):
        products = gains(base, args.model_dir, merged, device)
        shares = {name: (product / product[2]).tolist() for name, product in products.items() if product[2]}
        wrong = {
            name: abs(share - right) for name, (share, right, _) in shares.items() if not abs(share - right) <= SLACK
        }
        if wrong:
            worst = max(wrong, key=wrong.get)
            share, right, _ = shares[worst]
            raise ValueError(f"{worst} has gained {share:.3f} of its update, where a right merge gains {right:.3f}")
    _, right, whole = sum(products.values()).tolist()
    if right < LEAST * whole:
        raise UserError(
            f"{args.save_model_dir}: nothing is proven, since rounding to {merged.weights.dtype} leaves {right / whole:.2f} of "
            "the adapter's updates: train longer, or use it unmerged (web_demo.py --adapter_path)"
        )
    left = f"rounding leaves {right / whole:.4f} of these"
    print(f"{len(shares)} weights have gained their updates, as PEFT computes them; {left}")


def prove(args, base: ModelDirectory, merged: ModelDirectory, probes: list[tuple[list[dict], list[int]]], device):
    """Compare the merged model with base and adapter, of which one is in memory at a time, and print how it did.

    Raises: UserError: they differ by more than the bound of the dtype, or lay a conversation out in different ways.
    """
    prove_layout(args.save_model_dir, merged, probes)
    prove_weights(args, base, merged, device)
    texts = [ids for _, ids in probes]
    of_adapter, of_base = adapter_logits(base, args.model_dir, texts, device)
    gc.collect()  # a GPU may hold one of the models, not both
    torch.cuda.empty_cache()
    of_merged = logits_of(load_in_float32(merged, device), texts)
    model, alone = compare_logits(of_adapter, of_merged), compare_logits(of_adapter, of_base)
    dtype = merged.weights.dtype
    difference, divergence = BOUNDS[dtype]
    difference, divergence = min(difference * model.spread, alone.largest / 2), min(divergence, alone.divergence / 2)
    print(f"logits at {sum(map(len, of_adapter))} positions of {len(probes)} probes, against those of base + adapter")
    print(f"(standard deviation {model.spread:.3g}; computed in float32 from weights in {dtype})")
    print("                                      merged    at most   base alone")
    print(f"largest difference                  {model.largest:8.1e}   {difference:8.1e}   {alone.largest:8.1e}")
    print(f"mean KL divergence (nats)           {model.divergence:8.1e}   {divergence:8.1e}   {alone.divergence:8.1e}")
    print(f"equal argmax tokens                 {model.same_argmax:8.2%}              {alone.same_argmax:8.2%}")
    if not (model.largest <= difference and model.divergence <= divergence):
        worst = first_question(probes[model.worst][0])
        raise UserError(f"{args.save_model_dir}: does not compute what the adapter does; the worst probe is {worst!r}")


@entry_point
def main(argv=None):
    args = parse_args(argv)
    device, base, updates, probes = read_inputs(args)
    weights = base.weights
    ranks = " and ".join(map(str, sorted({len(update.a) for update in updates.values()})))
    size = f"{len(weights.tensors)} tensors, {weights.bytes / 1e9:.3g} GB, {weights.dtype}"
    print(f"base     {args.ori_model_dir}: {size}")
    print(f"adapter  {args.model_dir}: rank {ranks}, changes {len(updates)} of the tensors")
    if args.check_only:
        return prove(args, base, ModelDirectory(args.save_model_dir), probes, device)

    config = deepcopy(base.config)
    config.dtype = weights.dtype
    config.merged_adapter = {
        "base": args.ori_model_dir.resolve().name,
        "adapter": args.model_dir.resolve().name,
        "sha256": adapter_digest(args.model_dir),
    }
    planned, tensors = weights.tensors, merged_tensors(weights, updates, device)
    overwrite = args.overwrite if (args.save_model_dir / "config.json").exists() else None  # a model, and nothing else
    with whole_directory(args.save_model_dir, overwrite) as directory:
        if args.format == "llama":
            llama_export.save_llama(directory, config, base.tokenizer)
            planned = dict(llama_export.llama_tensors(planned.items()))
            tensors = llama_export.llama_tensors(tensors)
        else:
            save_baichuan(directory, config, base.tokenizer)
        settings = (args.ori_model_dir / "generation_config.json").read_text(encoding="utf-8-sig")
        (directory / "generation_config.json").write_text(settings, encoding="utf-8")  # as it is, turn markers and all
        write_weights(directory, planned, tensors)
        prove(args, base, ModelDirectory(directory), probes, device)
    print(f"{args.save_model_dir}: complete, {args.format} format")


if __name__ == "__main__":
    main()
