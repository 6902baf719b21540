"""An adapter directory, read and checked: is it plain LoRA, does it fit, and was it trained on this base?"""

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key

from support.errors import UserError, blaming, few
from support.files import file_digest, read_object
from support.model.directory import ModelDirectory
from support.model.weights import load_shard


class Update(NamedTuple):
    """What LoRA adds to one weight: scaling · B A."""

    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    scaling: float


# Settings of adapter_config.json. FOLLOWED: read_adapter uses them. HARMLESS: they say how an adapter was trained, not
# what it computes. STARTS: initial values of A and B that leave the base alone; pissa, olora and loftq change it.
FOLLOWED = ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"]
HARMLESS = ["auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"]
HARMLESS += ["target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern"]
STARTS = [True, False, "gaussian", "orthogonal"]


def read_adapter(directory: Path) -> dict[str, Update]:
    """{name of a base weight: its update}, with the settings that the adapter itself records.

    Raises:
        UserError: no LoRA adapter of linear layers, settings that change more than these, an adapter that does nothing.
    """
    settings = read_object(directory / "adapter_config.json")
    defaults = LoraConfig().to_dict() | {"peft_type": "LORA"}
    problems = []
    for name, value in settings.items():
        plain = value in STARTS if name == "init_lora_weights" else not value or value == defaults.get(name)
        if name not in FOLLOWED + HARMLESS and not plain:
            setting = f"{directory / 'adapter_config.json'}: {name} = {json.dumps(value)}"
            problems.append(f"{setting} is not supported here: merge this adapter with PEFT")
    if problems:
        raise UserError(*problems)
    settings = {name: defaults[name] for name in FOLLOWED} | settings
    ranks, alphas = settings["rank_pattern"] or {}, settings["alpha_pattern"] or {}  # of single modules
    numbers = [settings["r"], settings["lora_alpha"]]
    for pattern in (ranks, alphas):
        numbers += pattern.values() if isinstance(pattern, dict) else [None]
    if not all(type(number) in (int, float) and number > 0 for number in numbers):
        raise UserError(f"{directory / 'adapter_config.json'}: ranks and alphas must be positive numbers")

    path = adapter_file(directory)
    factors: dict[str, dict[str, torch.Tensor]] = {}  # {module: {"A": …, "B": …}}
    for key, tensor in load_shard(path).items():
        module, _, factor = key.removeprefix("base_model.model.").partition(".lora_")
        if not tensor.numel():
            remedy = "save it again with its parts gathered (stage3_gather_16bit_weights_on_model_save)"
            problems.append(f"{path}: {key} is empty, as ZeRO-3 leaves it without gathering: {remedy}")
        elif factor not in ("A.weight", "B.weight") or tensor.ndim != 2:
            problems.append(f"{path}: {key} is no lora_A or lora_B of a linear layer: merge this adapter with PEFT")
        elif not tensor.isfinite().all():
            problems.append(f"{path}: {key} holds infinite numbers or NaN: take an adapter saved earlier")
        factors.setdefault(module, {})[factor[:1]] = tensor
    if not problems and not any(pair["B"].any() for pair in factors.values() if "B" in pair):
        problems.append(f"{path}: the adapter is empty, it changes nothing: take one that was trained")
    if problems:
        raise UserError(*few(problems))

    updates = {}
    for module, pair in factors.items():
        rank = ranks.get(get_pattern_key(ranks, module), settings["r"])
        alpha = alphas.get(get_pattern_key(alphas, module), settings["lora_alpha"])
        if pair.keys() != {"A", "B"} or {pair["A"].shape[0], pair["B"].shape[1]} != {rank}:
            problems.append(f"{path}: {module} has no lora_A and lora_B of rank {rank}, which adapter_config.json says")
            continue
        scaling = alpha / (rank**0.5 if settings["use_rslora"] else rank)
        updates[f"{module}.weight"] = Update(pair["A"], pair["B"], scaling)
    if problems:
        raise UserError(*few(problems))
    return updates


def adapter_file(directory: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (directory / name).exists():
            return directory / name
    raise UserError(f"{directory}: holds no adapter_model.safetensors: name the directory of an adapter")


def adapter_digest(directory: Path) -> str:
    return file_digest(adapter_file(directory))


def refuse_misfit(base: ModelDirectory, adapter: Path, updates: dict[str, Update]):
    """Raise UserError if what the adapter holds does not fit this base, or was trained on another one."""
    weights, problems = base.weights, []
    for name, (a, b, _) in updates.items():
        if name not in weights.tensors:
            problems.append(f"{adapter}: changes {name}, which the base does not have")
        elif (shape := (b.shape[0], a.shape[1])) != weights.tensors[name][0]:
            problems.append(
                f"{adapter}: changes {name} as a matrix of {shape}, the base has {weights.tensors[name][0]}"
            )
    if problems:
        raise UserError(*few(problems))
    refuse_other_base(base, adapter)


def refuse_other_base(base: ModelDirectory, adapter: Path):
    """Raise UserError if the adapter was trained on other weights than those of `base`, or is merged into them already.

    Adapters of other programs do not record their base's weights. Where its name differs, a line says so.
    """
    name = str(read_object(adapter / "adapter_config.json").get("base_model_name_or_path") or "none")
    merge, trained_on = base.settings.get("merged_adapter"), training_record(adapter).get("base")
    remedy = f"name the base that it was trained on, called {name} then"
    if isinstance(merge, dict) and merge.get("sha256") == adapter_digest(adapter):
        raise UserError(f"{base.path}: has this adapter merged into it already: {remedy}")
    if trained_on not in (None, base.fingerprint):
        raise UserError(f"{adapter}: was trained on other weights than those of {base.path}: {remedy}")
    if trained_on is None and re.split(r"[\\/]", name.rstrip("/"))[-1] != base.path.resolve().name:
        if merge:
            raise UserError(f"{base.path}: is itself merged, and {adapter} was trained on another model: {remedy}")
        told = f"names {name} as its base; nothing in it tells whether {base.path} has the same weights"
        print(f"warning: {adapter}: {told}", file=sys.stderr)  # the answer of --ask stands alone


def load_adapter(model, directory) -> PeftModel:
    """Put the adapter of a directory beside the weights of `model`, which from then on computes with it. Raises: UserError."""
    with blaming(f"{directory}: the adapter cannot be loaded"):
        # Only layers whose values are in the file take memory, not those that a damaged setting asks for.
        # PEFT would first put them on the first GPU, wherever the model is.
        adapter = PeftModel.from_pretrained(model, directory, low_cpu_mem_usage=True, torch_device=str(model.device))
        if lacking := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
            raise ValueError(f"{lacking[0]} is missing")
    return adapter


# ---------------------------------------------------------------- on what it was trained

TRAINING = "training.json"  # beside an adapter; adapter_config.json is PEFT's, and knows no such fields


def write_training(adapter: Path, base: str, load_in_4bit: bool):
    """Record on what an adapter was trained: the base's fingerprint, and whether it was held in four bits."""
    (adapter / TRAINING).write_text(json.dumps({"base": base, "load_in_4bit": load_in_4bit}), encoding="utf-8")


def training_record(adapter: Path) -> dict:
    """What `write_training` has recorded; {} for the adapters of other programs, which have no such file.

    Raises: UserError.
    """
    path = adapter / TRAINING
    return read_object(path) if path.exists() else {}
