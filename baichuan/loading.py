"""Model directories: what they lack, and what they hold, with errors that name the file."""

import json
from copy import deepcopy
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from transformers import GenerationConfig
from transformers.utils import logging

from baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer
from baichuan.agreement import cache_error
from baichuan.generation_utils import messages_to_ids, turn_markers
from baichuan.script import UserError, few
from baichuan.weight_files import WEIGHT_FILES, Weights


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


def load_config(directory, kind=BaichuanConfig):
    """The config.json of a model directory. Raises: UserError."""
    try:
        return kind.from_pretrained(directory)
    except Exception as error:  # json, transformers and its checks of types each have their own
        raise UserError(f"{directory}/config.json: is no {kind.__name__}: {error.__cause__ or error}") from error


def refuse_unknown_tokens(generation_config, vocab_size: int):
    """Raise ValueError if a token of generation_config.json is none of the model's."""
    for name, value in vars(generation_config).items():
        if name.endswith("_token_id") and value is not None:
            ids = value if name == "eos_token_id" and isinstance(value, list) and value else [value]
            if not all(type(id) is int and 0 <= id < vocab_size for id in ids):
                raise ValueError(f"generation_config.json: {name} {value!r} is no token of the model")


def load_tokenizer(directory):
    """(tokenizer, generation_config) of a model directory. Raises: UserError."""
    config = load_config(directory)
    try:
        generation_config = GenerationConfig.from_pretrained(directory)
        markers = turn_markers(generation_config)
        refuse_unknown_tokens(generation_config, config.vocab_size)
        tokenizer = BaichuanTokenizer.from_pretrained(directory)
        if not tokenizer.text_to_ids("。") or not isinstance(tokenizer.init_kwargs.get("auto_map", {}), dict):
            raise ValueError("a file is damaged")
        json.dumps(tokenizer.init_kwargs, default=str, ensure_ascii=False).encode()  # as it will be saved
        if turn_markers(tokenizer) != markers:
            raise ValueError("generation_config.json and tokenizer_config.json name different turn markers")
        if len(tokenizer) != config.vocab_size:
            raise ValueError(f"it has {len(tokenizer)} tokens, config.json says {config.vocab_size}")
    except Exception as error:  # SentencePiece, protobuf, json and transformers each have their own
        raise UserError(f"{directory}: the tokenizer cannot be loaded: {error}") from error
    return tokenizer, generation_config


def refuse_misfits(directory, config, weights: Weights, kind=BaichuanForCausalLM):
    """Raise UserError naming the stored tensors that are not those of the model `kind(config)`.

    To be called before that is built: the model that a damaged config.json asks for may exceed the memory.
    """
    try:
        if config.num_hidden_layers > len(weights.tensors):  # even without numbers, many layers take memory
            raise ValueError(f"it asks for {config.num_hidden_layers} layers, the weights have fewer")
        with torch.device("meta"):  # shapes without numbers
            model = kind(config)
    except Exception as error:  # sizes that do not go together fail anywhere in torch and transformers
        raise UserError(f"{directory}/config.json: no model can be built from it: {error}") from error
    if problems := weights.problems(model):
        raise UserError(*few([f"{directory}: {problem}" for problem in problems]))


def load_model(directory, dtype: torch.dtype | str, attn_implementation: str = "sdpa"):
    """The model of a directory, on the CPU; dtype "auto" is the checkpoint's. Raises: UserError naming what does not fit."""
    refuse_misfits(directory, load_config(directory), Weights(Path(directory)))
    logging.set_verbosity_error()  # its table of tensors that do not fit; the error below names them
    try:
        return BaichuanForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attn_implementation)
    except Exception as error:  # a broken file fails in torch, safetensors, pickle, json or transformers
        raise UserError(f"{directory}: the model cannot be loaded: {error}") from error


def load_adapter(model, directory) -> PeftModel:
    """Put the adapter of a directory beside the weights of `model`, which keeps its place inside. Raises: UserError."""
    try:
        # Its layers take memory once their numbers are found, not when a damaged setting asks for them.
        adapter = PeftModel.from_pretrained(model, directory, low_cpu_mem_usage=True)
        if lacking := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
            raise ValueError(f"{lacking[0]} is missing")
    except Exception as error:  # a damaged file, or one for a model of another shape: PEFT has no class for it
        raise UserError(f"{directory}: the adapter cannot be loaded: {error}") from error
    return adapter


def refuse_to_fail_later(directory, model, tokenizer, generation_config: GenerationConfig):
    """Generate a few tokens: settings of an adapter or of generation_config.json, and a cache that a release of
    transformers treats otherwise, turn out wrong only then.

    Raises: UserError.
    """
    prompts = [
        messages_to_ids(tokenizer, [{"role": "user", "content": question}], tokenizer)
        for question in ("你好", "你是谁？从哪里来？")
    ]
    ids = torch.tensor(prompts[:1], device=model.device)
    config = deepcopy(generation_config)
    config.update(max_new_tokens=1)
    training = model.training
    model.eval()
    try:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        error = cache_error(model, prompts, tokenizer.pad_token_id)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any, as deep as the setting is used
        raise UserError(f"{directory}: no answer can be generated with its weights and settings: {error}") from error
    finally:
        model.train(training)
    if not error <= (1e-3 if model.dtype == torch.float32 else 0.2):  # measured: 1e-6 and 0.01; 1 where a cache is lost
        raise UserError(
            f"{directory}: under transformers {transformers.__version__} answers differ with and without the cache of "
            f"keys and values (by {error:.2g} of the logits' spread): pip install -r requirements.txt -c constraints.txt"
        )


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
