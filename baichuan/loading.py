"""Model directories: what they lack, and what they hold, with errors that name the file."""

import json
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer
from baichuan.generation_utils import turn_markers
from baichuan.script import UserError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def model_directory_problems(directory) -> list[str]:
    """What a directory lacks to be loaded as a Baichuan2 model. Looks at files' presence only."""
    directory = Path(directory)
    if not directory.is_dir():
        return [
            f"{directory}: there is no such directory; download the model to it, or make a small one: python3 -m baichuan.tiny"
        ]
    names = ("config.json", "generation_config.json", "tokenizer.model")
    problems = [f"{directory}: {name} is missing" for name in names if not (directory / name).is_file()]
    weights = [name for name in WEIGHT_FILES if (directory / name).is_file()]
    if not weights:
        problems.append(f"{directory}: has no weights (model.safetensors or pytorch_model.bin, whole or with an index)")
    elif weights[0].endswith(".index.json"):
        try:
            shards = set(json.loads((directory / weights[0]).read_text(encoding="utf-8"))["weight_map"].values())
            problems += [
                f"{directory}: {name} is missing" for name in sorted(shards) if not (directory / name).is_file()
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            problems.append(f"{directory / weights[0]}: is no index of weight files; download it again")
    return problems


def load_config(directory) -> BaichuanConfig:
    """The config.json of a model directory. Raises: UserError."""
    try:
        return BaichuanConfig.from_pretrained(directory)
    except Exception as error:  # json, transformers and its checks of types each have their own
        raise UserError(f"{directory}/config.json: is no Baichuan2 configuration: {error}") from error


def load_tokenizer(directory):
    """(tokenizer, generation_config) of a model directory. Raises: UserError."""
    config = load_config(directory)
    try:
        generation_config = GenerationConfig.from_pretrained(directory)
        markers = turn_markers(generation_config)
        tokenizer = BaichuanTokenizer.from_pretrained(directory)
        if not tokenizer.text_to_ids("。") or not isinstance(tokenizer.init_kwargs.get("auto_map", {}), dict):
            raise ValueError("a file is damaged")
        largest = max(len(tokenizer) - 1, tokenizer.eos_token_id, *markers.values())
        if largest >= config.vocab_size:
            raise ValueError(f"it has the token {largest}, config.json says that there are {config.vocab_size}")
    except Exception as error:  # SentencePiece, protobuf, json and transformers each have their own
        raise UserError(f"{directory}: the tokenizer cannot be loaded: {error}") from error
    return tokenizer, generation_config


def load_model(directory, dtype: torch.dtype, attn_implementation: str = "sdpa"):
    """The model of a directory, on the CPU. Raises: UserError naming what does not fit."""
    logging.set_verbosity_error()  # its table of tensors that do not fit; the error below names them
    try:
        return BaichuanForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attn_implementation)
    except Exception as error:  # a broken file fails in torch, safetensors, pickle, json or transformers
        raise UserError(f"{directory}: the model cannot be loaded: {error}") from error


def pick_device(name: str) -> torch.device:
    """cpu, -1, auto or a GPU's number → a device that is there. Raises: UserError."""
    if name == "auto":
        name = "0" if torch.cuda.is_available() else "cpu"
    if name in ("cpu", "-1"):
        return torch.device("cpu")
    if not name.isdecimal():
        raise UserError(f"--device {name}: is no device: use cpu, auto or the number of a GPU")
    if int(name) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: CUDA finds {torch.cuda.device_count()} GPUs here: use --device cpu")
    return torch.device("cuda", int(name))
