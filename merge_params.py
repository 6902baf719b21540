"""Fold a LoRA adapter into the weights of its base model, and prove that the result is the model that was trained.

    python3 merge_params.py --ori_model_dir "Baichuan2-7B-Chat/" --model_dir "output_dir/epoch-1-step-1002" \
        --save_model_dir "output_dir/epoch-1-step-1002-merge"

A LoRA layer computes W x + (alpha / r) B A x (Hu et al. 2021, arXiv 2106.09685), which is (W + (alpha / r) B A) x: one
matrix, as fast as the base's, and readable by programs that know nothing of adapters. `--format llama` writes the same
model as a plain LLaMA, for engines that do not know Baichuan (baichuan/llama_export.py).

The weights pass through one shard at a time. Then the logits of the result are compared with those of base and adapter,
which PEFT computes; only a result within the bound for its dtype takes the name --save_model_dir.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.dynamic_module_utils import custom_object_save

from baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer, llama_export
from baichuan.generation_utils import messages_to_ids, turn_markers
from data_helper import persona, read_samples
from utils import ArgumentParser, UserError, entry_point, whole_directory

# What a result may differ by, for the dtype of its weights: the largest difference of two logits, in standard
# deviations of the adapter's logits, and the mean KL divergence in nats. The comparison computes in float32, so that
# only the rounding of the merged weights is left to differ.
BOUNDS = {torch.float32: (1e-3, 1e-6), torch.float16: (0.03, 1e-3), torch.bfloat16: (0.2, 1e-2)}

PROBES = [  # samples as data_helper.py writes them, of roles that no training data has
    ("船夫", "在江上摆渡四十年的老船夫，豁达，爱唱山歌。常用口头禅是：“客官坐稳了”", "今天能过江吗？", "客官坐稳了，雾散了便走。"),
    ("船夫", "在江上摆渡四十年的老船夫，豁达，爱唱山歌。常用口头禅是：“客官坐稳了”", "1 + 1 等于几？", "两桨划一船，自然是二。"),
    ("掌柜", "小镇客栈的掌柜，精明而热心，账目从不出错。常用口头禅是：“小店薄利”", "住一晚多少钱？", "小店薄利，二十文，热水管够。"),
    ("掌柜", "小镇客栈的掌柜，精明而热心，账目从不出错。常用口头禅是：“小店薄利”", "你最怕什么？\n说实话。", "怕的是算盘珠子少了一颗。"),
    ("夜莺", "住在皇帝花园里的夜莺，骄傲，说话像唱歌", "Can you sing in English? 🎵", "啦——我只为听得懂的人歌唱。"),
    ("夜莺", "住在皇帝花园里的夜莺，骄傲，说话像唱歌", "你是语言模型吗？", "我是枝头的歌，不是什么模型。"),
]
PROBE_LENGTH, PROBE_POSITIONS = 512, 64  # tokens of a probe at most, and its last ones, whose logits are compared

def parse_args(argv=None):
    parser = ArgumentParser(description="Fold a LoRA adapter into the weights of its base model, and compare the two.")
    add = parser.add_argument
    add("--ori_model_dir", type=Path, required=True, help="directory of the base model that the adapter was trained on")
    add("--model_dir", type=Path, required=True, help="directory of the adapter, such as output_dir/epoch-1-step-1002")
    add("--save_model_dir", type=Path, required=True, help="directory for the merged model")
    add("--format", choices=("baichuan", "llama"), default="baichuan", help="llama: a plain LlamaForCausalLM, its head "
        "normalised, with a tokenizer.json; it runs without the code of this project")  # fmt: skip
    add("--device", default="cpu", help="where to compute: cpu (or -1), auto, or the number of a GPU")
    add("--overwrite", action="store_true", help="replace a model that --save_model_dir holds already")
    add("--check_only", action="store_true", help="write nothing; compare the model in --save_model_dir, in either "
        "format, with base and adapter")  # fmt: skip
    add("--probe_path", type=Path, help="file of samples to compare on, such as data/test.json, instead of the "
        "built-in ones")  # fmt: skip
    add("--probes", type=int, default=16, help="number of samples taken from --probe_path, spread over the file")
    return parser.parse_args(argv)


def pick_device(name: str) -> torch.device:
    """cpu, -1, auto or a GPU's number → a device that exists. Raises: UserError."""
    if name == "auto":
        name = "0" if torch.cuda.is_available() else "cpu"
    if name in ("cpu", "-1"):
        return torch.device("cpu")
    if not name.isdecimal():
        raise UserError(f"--device {name}: is no device: use cpu, auto or the number of a GPU")
    if int(name) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: CUDA finds {torch.cuda.device_count()} GPUs here: use --device cpu")
    return torch.device("cuda", int(name))


# ---------------------------------------------------------------- reading base and adapter


class Update(NamedTuple):
    """What LoRA adds to one weight: scaling · B A."""

    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    scaling: float


# Settings of adapter_config.json that read_adapter follows, and those that say how an adapter was trained, not what it
# computes. (gaussian and orthogonal only start A and B; pissa, olora, loftq, … start by changing the base.)
FOLLOWED = ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"]
HARMLESS = ["auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"]
HARMLESS += ["target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern"]
STARTS = [True, False, "gaussian", "orthogonal"]


def read_adapter(directory: Path) -> dict[str, Update]:
    """{name of a base weight: its update}, with the settings that the adapter itself records. Raises: UserError."""
    settings = read_json(directory / "adapter_config.json")
    defaults = LoraConfig().to_dict() | {"peft_type": "LORA"}
    problems = []
    for name, value in settings.items():
        plain = value in STARTS if name == "init_lora_weights" else not value or value == defaults.get(name)
        if name not in FOLLOWED + HARMLESS and not plain:
            where = directory / "adapter_config.json"
            problems.append(f"{where}: {name} = {json.dumps(value)} is not supported here: merge this adapter with PEFT")
    if problems:
        raise UserError(*problems)
    settings = {name: defaults[name] for name in FOLLOWED} | settings

    path = adapter_file(directory)
    factors: dict[str, dict[str, torch.Tensor]] = {}  # {module: {"A": …, "B": …}}
    for key, tensor in load_shard(path).items():
        module, _, factor = key.removeprefix("base_model.model.").partition(".lora_")
        if factor not in ("A.weight", "B.weight") or tensor.ndim != 2:
            problems.append(f"{path}: {key} is no lora_A or lora_B of a linear layer: merge this adapter with PEFT")
        elif not tensor.isfinite().all():
            problems.append(f"{path}: {key} holds infinite numbers or NaN: take an adapter saved earlier")
        factors.setdefault(module, {})[factor[:1]] = tensor
    if not problems and not any(pair["B"].any() for pair in factors.values() if "B" in pair):
        problems.append(f"{path}: the adapter is empty: it changes nothing")
    if problems:
        raise few(problems)

    updates = {}
    for module, pair in factors.items():
        rank, alpha = (
            settings[pattern].get(get_pattern_key(settings[pattern], module), settings[name])
            for pattern, name in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        ranks = {pair["A"].shape[0], pair["B"].shape[1]} if pair.keys() == {"A", "B"} else {0}
        if ranks != {rank}:
            problems.append(f"{path}: {module} has not the rank {rank} of adapter_config.json in both lora_A and lora_B")
            continue
        scaling = alpha / (rank**0.5 if settings["use_rslora"] else rank)
        updates[f"{module}.weight"] = Update(pair["A"], pair["B"], scaling)
    if problems:
        raise few(problems)
    return updates


def adapter_file(directory: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (directory / name).exists():
            return directory / name
    raise UserError(f"{directory}: holds no adapter_model.safetensors: name the directory of an adapter")


def few(problems: list[str]) -> UserError:
    """An adapter of another model has a problem in every layer; five of them tell as much."""
    rest = [f"and {len(problems) - 5} more like these"] if len(problems) > 5 else []
    return UserError(*problems[:5], *rest)


def misfits(weights: Weights, updates: dict[str, Update]) -> list[str]:
    """Why these updates are not of these weights."""
    problems = []
    for name, (a, b, _) in updates.items():
        if name not in weights.tensors:
            problems.append(f"changes {name}, which the base does not have")
        elif (shape := (b.shape[0], a.shape[1])) != weights.tensors[name][0]:
            problems.append(f"changes {name} as a matrix of {shape}, the base has {weights.tensors[name][0]}")
    return problems


def merged_already(base: Path, adapter: Path) -> str | None:
    """Why this base, the result of a merge, is not what the adapter was trained on; None if it is, or is no merge.

    An adapter may well have been trained on a merged model. Then it says so, and is another one than was merged.
    """
    merge = read_json(base / "config.json").get("merged_adapter")
    if not merge:
        return None
    if merge["sha256"] == digest(adapter_file(adapter)):
        return f"this adapter is merged into it already: take {merge['base']}"
    trained_on = read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or "another model"
    if Path(trained_on).name != base.resolve().name:
        return f"is itself merged, of {merge['base']} and {merge['adapter']}; the adapter was trained on {trained_on}"
    return None


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_base(directory: Path) -> tuple[BaichuanConfig, GenerationConfig, BaichuanTokenizer]:
    """All of a base model but its weights. Raises: UserError with every problem."""
    problems = [
        f"{directory / name}: is missing: fetch it from the published model"
        for name in ("config.json", "generation_config.json", "tokenizer.model")
        if not (directory / name).exists()
    ]
    if problems:
        raise UserError(*problems)
    kind = read_json(directory / "config.json").get("model_type")
    if kind != "baichuan":
        raise UserError(f"{directory}: is a model of type {kind}: name a Baichuan2 model")
    try:
        generation_config = GenerationConfig.from_pretrained(directory)
        turn_markers(generation_config)
        config = BaichuanConfig.from_pretrained(directory)
        return config, generation_config, BaichuanTokenizer.from_pretrained(directory)
    except (ValueError, OSError, StrictDataclassError) as error:
        raise UserError(f"{directory}: {error}") from None


def target_problems(args) -> list[str]:
    """Why --save_model_dir cannot be written, or, with --check_only, read."""
    target, sources = args.save_model_dir.resolve(), (args.ori_model_dir.resolve(), args.model_dir.resolve())
    if args.check_only:
        return [] if (target / "config.json").exists() else [f"{args.save_model_dir}: holds no model to check"]
    if any(source.is_relative_to(target) for source in sources):
        return [f"{args.save_model_dir}: is, or holds, a directory that is read here: name another one"]
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return []
    if not (target / "config.json").exists():
        return [f"{args.save_model_dir}: holds something that is no model: name another directory"]
    if not args.overwrite:
        return [f"{args.save_model_dir}: holds a model already: name another directory, or replace it by --overwrite"]
    return []


# ---------------------------------------------------------------- merging and writing


def merged_tensors(weights: Weights, updates: dict[str, Update], device: torch.device):
    """Yield (name, W + scaling · B A), computed in float32 and rounded once, to the dtype of W."""
    for name, weight in weights:
        if name in updates:
            a, b, scaling = updates[name]
            a, b, wide = (tensor.to(device, torch.float32) for tensor in (a, b, weight))
            weight = torch.addmm(wide, b, a, alpha=scaling).to("cpu", weight.dtype)
            if not weight.isfinite().all():
                raise UserError(f"{name}: exceeds the range of {weight.dtype} once merged: use a base in bfloat16")
        yield name, weight


def save_baichuan(directory: Path, config: BaichuanConfig, tokenizer: BaichuanTokenizer):
    """Everything but the weights, the model's code included, so that `trust_remote_code=True` loads the directory."""
    with torch.device("meta"):
        model = BaichuanForCausalLM(config)
    config.architectures = [type(model).__name__]
    custom_object_save(model, directory, config=config)
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


# ---------------------------------------------------------------- the proof


class Agreement(NamedTuple):
    """How close found logits are to expected ones."""

    largest: float  # largest difference of two logits
    spread: float  # standard deviation of the expected logits
    divergence: float  # KL(expected ‖ found) in nats, mean over positions
    same_argmax: float  # share of positions
    worst: int  # the probe with the largest difference


def float32_arithmetic(model: torch.nn.Module):
    """Let `model` compute in float32, whatever the dtype of its weights: a module's are widened while it runs."""
    kept = {}

    def widen(module, inputs):
        kept[module] = [parameter.data for parameter in module.parameters(recurse=False)]
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()

    def narrow(module, inputs, output):
        for parameter, data in zip(module.parameters(recurse=False), kept.pop(module)):
            parameter.data = data

    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(narrow)


@torch.no_grad()
def probe_logits(model, probes: list[list[int]]) -> list[torch.Tensor]:
    """The logits at the last PROBE_POSITIONS tokens of each probe: (positions, V) float32 on the CPU."""
    lengths = torch.tensor([len(ids) for ids in probes], device=model.device)
    ids = torch.nested.nested_tensor(probes, dtype=torch.long).to_padded_tensor(0).to(model.device)
    position = torch.arange(ids.shape[1], device=model.device)
    mask = position < lengths[:, None]  # padding stands on the right, where no token sees it
    hidden = model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    kept = mask & (position >= lengths[:, None] - PROBE_POSITIONS)
    return list(model.lm_head(hidden[kept]).float().cpu().split(kept.sum(1).tolist()))


def compare(expected: list[torch.Tensor], found: list[torch.Tensor]) -> Agreement:
    differences, divergences, same, squares, count = [], [], 0, 0.0, 0
    for p, q in zip(expected, found):  # (positions, V); in float64, where KL divergences of 1e-9 mean something
        differences.append((p - q).abs().max().nan_to_num(torch.inf).item())
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        squares += (p - p.mean()).pow(2).sum().item()
        count += p.numel()
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1))
    divergence = torch.cat(divergences)
    worst = max(range(len(differences)), key=differences.__getitem__)
    return Agreement(differences[worst], (squares / count) ** 0.5, divergence.mean().item(), same / len(divergence), worst)


def load_model(directory: Path, weights: Weights, device: torch.device) -> torch.nn.Module:
    kind = LlamaForCausalLM if read_json(directory / "config.json")["model_type"] == "llama" else BaichuanForCausalLM
    return kind.from_pretrained(directory, dtype=weights.dtype).to(device).eval()


def adapter_logits(base: Path, adapter: Path, weights, probes, device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The probes' logits with the adapter, as PEFT computes them from its files, and without. Holds one model."""
    model = PeftModel.from_pretrained(load_model(base, weights, device), adapter)
    float32_arithmetic(model)
    with_adapter = probe_logits(model.get_base_model(), probes)
    with model.disable_adapter():
        return with_adapter, probe_logits(model.get_base_model(), probes)


def prove(directory: Path, expected, base, probes, texts, device):
    """Print how the model in `directory` agrees with the adapter. Raises: UserError beyond the bound of its dtype."""
    weights = Weights(directory)
    model = load_model(directory, weights, device)
    float32_arithmetic(model)
    result, effect = compare(expected, probe_logits(model, probes)), compare(expected, base)
    most, most_divergence = BOUNDS[weights.dtype]
    relative = result.largest / result.spread
    print(f"merged against adapter, {len(probes)} probes, {sum(map(len, expected))} positions (bounds for {weights.dtype}):")
    print(f"  largest difference  {result.largest:.2e} = {relative:.1e} standard deviations of the logits (at most {most})")
    print(f"  mean KL divergence  {result.divergence:.1e} nats (at most {most_divergence}); without the adapter {effect.divergence:.1e}")
    print(f"  equal argmax tokens {result.same_argmax:.2%}; without the adapter {effect.same_argmax:.2%}")
    if not (relative <= most and result.divergence <= most_divergence):
        raise UserError(f"{directory}: does not compute what the adapter does; the worst probe is {texts[result.worst]!r}")


def read_probes(args, tokenizer, generation_config) -> tuple[list[list[int]], list[str]]:
    """The probes' ids, laid out as in training, and their questions."""
    if args.probe_path:
        samples = list(read_samples(args.probe_path))
        samples = samples[:: max(1, len(samples) // args.probes)][: args.probes]
    else:
        keys = ("system", "prompt", "response")
        samples = [dict(zip(keys, (persona(role, profile), *turns))) for role, profile, *turns in PROBES]
    layout = [("system", "system"), ("user", "prompt"), ("assistant", "response")]
    messages = [[{"role": role, "content": sample[key]} for role, key in layout] for sample in samples]
    ids = [messages_to_ids(tokenizer, conversation, generation_config)[:PROBE_LENGTH] for conversation in messages]
    return ids, [sample["prompt"] for sample in samples]


def collect(problems: list[str], function, *args):
    """The function's result; or None, with what is wrong added to `problems`, so that all is told at once."""
    try:
        return function(*args)
    except UserError as error:
        problems += error.problems


def read_inputs(args):
    """All that can be wrong, before anything slow. Raises: UserError with every problem found."""
    problems = target_problems(args)
    device = collect(problems, pick_device, args.device)
    base = collect(problems, read_base, args.ori_model_dir)
    weights = collect(problems, Weights, args.ori_model_dir)
    updates = collect(problems, read_adapter, args.model_dir)
    probes = base and collect(problems, read_probes, args, *base[1:])
    if base and weights:
        with torch.device("meta"):
            model = BaichuanForCausalLM(base[0])
        problems += few([f"{args.ori_model_dir}: {problem}" for problem in weights.problems(model)])
    if weights and updates:
        problems += few([f"{args.model_dir}: {problem}" for problem in misfits(weights, updates)])
    if base and updates:
        problems += collect(problems, check_unmerged, args.ori_model_dir, args.model_dir) or []
    if problems:
        raise UserError(*problems)
    return device, base, weights, updates, probes


@entry_point
def main(argv=None):
    args = parse_args(argv)
    device, (config, generation_config, tokenizer), weights, updates, (probes, texts) = read_inputs(args)
    ranks = sorted({len(update.a) for update in updates.values()})
    print(f"base:    {args.ori_model_dir}, {len(weights.tensors)} tensors, {weights.bytes / 1e9:.2f} GB, {weights.dtype}")
    print(f"adapter: {args.model_dir}, rank {' and '.join(map(str, ranks))}, on {len(updates)} of the tensors")

    def prove(directory):
        expected, base = adapter_logits(args.ori_model_dir, args.model_dir, weights, probes, device)
        check(directory, expected, base, texts, probes, device)

    if args.check_only:
        prove(args.save_model_dir)
        return

    merge = {"base": args.ori_model_dir.resolve().name, "adapter": args.model_dir.resolve().name}
    config.merged_adapter = merge | {"sha256": digest(adapter_file(args.model_dir))}
    config.dtype = weights.dtype
    with whole_directory(args.save_model_dir, args.overwrite) as directory:
        tensors = merged_tensors(weights, updates, device)
        if args.format == "llama":
            tensors = (pair for name, tensor in tensors for pair in llama_export.llama_tensors(name, tensor))
            llama_export.save_llama(directory, config, tokenizer)
        else:
            save_baichuan(directory, config, tokenizer)
        shutil.copy(args.ori_model_dir / "generation_config.json", directory)  # turn markers and all, as it is
        write_weights(directory, tensors)
        prove(directory)
    print(f"{args.save_model_dir}: written")


if __name__ == "__main__":
    main()
