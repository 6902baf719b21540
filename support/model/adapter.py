"""An adapter directory, read and checked: is it plain LoRA, does it fit, and was it trained on this base?"""

import json
import sys
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from support.errors import UserError, blaming
from support.files import file_digest, read_object
from support.model.directory import ModelDirectory
from support.model.weights import load_shard


class Update(NamedTuple):
    """What LoRA adds to one weight: scaling · B A."""

    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    scaling: float


# Settings of adapter_config.json that PEFT follows while it reads an adapter, or that only say how it was trained.
# All others must be PEFT's defaults. STARTS: initial values of A and B that leave the base as it is, as pissa does not.
PLAIN = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "inference_mode"}
PLAIN |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
PLAIN |= {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version"}
STARTS = [True, False, "gaussian", "orthogonal"]


def read_adapter(base: ModelDirectory, directory: Path) -> dict[str, Update]:
    """{name of a weight of `base`: its update}, with the settings that the adapter itself records.

    Raises: UserError: settings that change more than linear layers, an adapter that does nothing, or one of another base.
    """
    path = directory / "adapter_config.json"
    defaults = LoraConfig().to_dict() | {"peft_type": "LORA"}
    for name, value in read_object(path).items():
        plain = value in STARTS if name == "init_lora_weights" else not value or value == defaults.get(name)
        if name not in PLAIN and not plain:
            raise UserError(f"{path}: {name} = {json.dumps(value)} is not supported here: merge this adapter with PEFT")
    updates, factors = {}, load_shard(adapter_file(directory))  # PEFT would round them to the base's dtype
    if outside := [name for name in factors if ".layers." not in name]:
        told = "adapters of the head or the embedding are not supported here: train one of the decoder's layers alone"
        raise UserError(f"{directory}: holds {min(outside)}, and {told}")
    for name, layer in load_adapter(base.load_mapped(), directory).get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            a, b = (factors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
            updates[f"{name}.weight"] = Update(a, b, layer.scaling["default"])
            if not (a.isfinite().all() and b.isfinite().all()):
                raise UserError(f"{directory}: {name} holds infinite numbers or NaN: take an adapter saved earlier")
    if not any(update.b.any() for update in updates.values()):
        raise UserError(f"{directory}: the adapter is empty, it changes nothing: take one that was trained")
    refuse_other_base(base, directory)
    return updates


def load_adapter(model, directory) -> PeftModel:
    """Put the adapter of a directory beside the weights of `model`, which from then on computes with it. Raises: UserError."""
    stored = load_shard(adapter_file(directory)).keys()
    with blaming(f"{directory}: the adapter cannot be loaded"):
        # PEFT would first put it on the first GPU, wherever the model is.
        adapter = PeftModel.from_pretrained(model, directory, low_cpu_mem_usage=True, torch_device=str(model.device))
        if odd := stored ^ get_peft_model_state_dict(adapter, save_embedding_layers=False).keys():
            raise ValueError(f"its file and the base do not both have {min(odd)}")
    return adapter


def adapter_file(directory) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (path := Path(directory) / name).exists():
            return path
    raise UserError(f"{directory}: holds no adapter_model.safetensors: name the directory of an adapter")


def adapter_digest(directory: Path) -> str:
    return file_digest(adapter_file(directory))


TRAINING = "training.json"  # beside an adapter; adapter_config.json is PEFT's, and knows no such fields


def refuse_other_base(base: ModelDirectory, adapter: Path):
    """Raise UserError if the adapter was trained on other weights than those of `base`.

    Adapters of other programs do not record their base's weights. Where its name differs, a line says so.
    """
    name = str(read_object(adapter / "adapter_config.json").get("base_model_name_or_path") or "none")
    trained_on = training_record(adapter).get("base")
    remedy = (
        f"name the base that it was trained on, called {name} then; saved anew in float16, or from it, it is another"
    )
    if trained_on not in (None, base.fingerprint):
        raise UserError(f"{adapter}: was trained on other weights than those of {base.path}: {remedy}")
    if trained_on is None and PureWindowsPath(name).name != base.path.resolve().name:  # / and \ part names there
        if "merged_adapter" in base.settings:
            raise UserError(f"{base.path}: is itself merged, and {adapter} was trained on another model: {remedy}")
        told = f"names {name} as its base; nothing in it tells whether {base.path} has the same weights"
        print(f"warning: {adapter}: {told}", file=sys.stderr)  # on stdout the answer of --ask stands alone


def write_training(adapter: Path, base: str):
    """Record on what an adapter was trained: the base's fingerprint."""
    (adapter / TRAINING).write_text(json.dumps({"base": base}), encoding="utf-8")


def training_record(adapter: Path) -> dict:
    """What `write_training` has recorded; {} for the adapters of other programs, which have no such file. Raises: UserError."""
    path = adapter / TRAINING
    return read_object(path) if path.exists() else {}
