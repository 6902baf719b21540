"""A model directory, opened and checked once: config.json, generation_config.json, tokenizer, weights."""

import os
from copy import deepcopy
from functools import cached_property
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer
from baichuan.generation_utils import messages_to_ids, turn_markers
from support.command_line import said_if_slow
from support.device import free_memory
from support.errors import Problems, UserError, blaming
from support.files import fingerprint, kind_of_file, read_object
from support.model.answering import end_ids, unusable_settings
from support.model.comparison import cache_error
from support.model.four_bit import check_four_bit, keep_as_loaded, loading
from support.model.weights import Weights

CPU = torch.device("cpu")


class ModelDirectory:
    """A Baichuan2 model on disk, or the LLaMA that merge_params.py exports. Each part is read at its first use.

    Attributes:
        config, generation_config, tokenizer, weights: raise a UserError that names the file where it is not right.
    """

    def __init__(self, path):
        self.path = Path(path)

    def check(self, four_bit: bool = False) -> "ModelDirectory":
        """Open all of a Baichuan2 but the values of its weights. Raises: UserError with what is missing or does not fit."""
        if not self.path.is_dir():
            remedy = "download the model to it, or make a small one: python3 -m support.model.stand_in"
            raise UserError(f"{self.path}: there is no such directory; {remedy}")
        if (self.path / "adapter_config.json").exists():
            remedy = "merge it into its base with merge_params.py first, or name the base here and it as --adapter_path"
            raise UserError(f"{self.path}: is an adapter: {remedy}")
        if self.config.model_type == "llama":
            remedy = "name a Baichuan2 model; other engines and predict.py --engine take a LLaMA export"
            raise UserError(f"{self.path}: is a model of the type llama: {remedy}")
        with Problems() as problems:
            for part in ("generation_config", "tokenizer", "weights"):
                problems.of(getattr, self, part)
        # Shapes alone: transformers would first fill what is missing with random numbers, for minutes.
        with blaming(f"{self.path}: the weights do not fit config.json"), torch.device("meta"):
            BaichuanForCausalLM(self.config).load_state_dict(self.weights.tensors)
        if four_bit:
            check_four_bit(self)
        return self

    @cached_property
    def settings(self) -> dict:
        """config.json as it stands."""
        return read_object(self.path / "config.json")

    @property
    def _kind(self):
        return LlamaForCausalLM if self.settings.get("model_type") == "llama" else BaichuanForCausalLM

    @cached_property
    def config(self) -> BaichuanConfig | LlamaConfig:
        kind = self._kind.config_class
        with blaming(f"{self.path}/config.json: is no {kind.__name__}"):
            if problem := other_model(self.settings):
                raise UserError(f"{self.path}: {problem}: take Baichuan2-7B-Chat, as it was published")
            if (self.path / "config.json").read_bytes().startswith(b"\xef\xbb\xbf"):  # transformers does not read it
                raise UserError(f"{self.path}/config.json: begins with a byte-order mark: save it as UTF-8 without one")
            return kind.from_pretrained(self.path)

    @cached_property
    def generation_config(self) -> GenerationConfig:
        path = self.path / "generation_config.json"
        settings = read_object(path) if path.exists() else {}
        if settings.get("temperature") == 0:
            settings |= {"do_sample": False, "temperature": 1.0, "top_k": 1}  # which is greedy, even for who samples
        if problems := unusable_settings(settings, self.config.vocab_size):
            raise UserError(*(f"{path}: {problem}" for problem in problems))
        config = GenerationConfig.from_dict(settings)
        with blaming(str(path)):
            turn_markers(config)
        return config

    @cached_property
    def tokenizer(self) -> BaichuanTokenizer:
        markers, path = turn_markers(self.generation_config), self.path / "tokenizer.model"
        with blaming(f"{self.path}: the tokenizer cannot be loaded"):
            if kind := kind_of_file(path):
                raise UserError(f"{path}: {kind}")
            tokenizer = BaichuanTokenizer.from_pretrained(self.path)
            if not isinstance(tokenizer.init_kwargs.get("auto_map", {}), dict):  # else it could not be saved
                raise ValueError("auto_map in tokenizer_config.json is no object")
            if turn_markers(tokenizer) != markers:
                raise ValueError("generation_config.json and tokenizer_config.json name different turn markers")
            if tokenizer.eos_token_id not in end_ids(self.generation_config):
                end = self.generation_config.eos_token_id
                raise ValueError(
                    f"answers end at another token (eos_token_id {end} in generation_config.json) than is learned "
                    f"(eos_token {tokenizer.eos_token}, id {tokenizer.eos_token_id}, in tokenizer_config.json): "
                    "take both files of Baichuan2-7B-Chat"
                )
            if len(tokenizer) != self.config.vocab_size:
                raise ValueError(f"it has {len(tokenizer)} tokens, config.json says {self.config.vocab_size}")
        return tokenizer

    @cached_property
    def weights(self) -> "Weights":
        return Weights(self.path)

    @cached_property
    def fingerprint(self) -> str:
        """Of what the model computes: the settings that no tensor shows, and some values of every tensor, megabytes in all.

        It is the same wherever the directory lies, in however many files and in whichever layout its weights are, and in
        float32 as rounded to bfloat16.
        """
        config, values = self.config, {}
        for name, tensor in self.weights:
            runs = tensor.flatten().unfold(0, min(32, tensor.numel()), 1)  # a view: all runs of so many neighbours
            some = runs[[number * (len(runs) - 1) // 7 for number in range(8)]].to(torch.bfloat16)
            values[name] = f"{name} {tuple(tensor.shape)}".encode() + some.view(torch.int16).numpy().tobytes()
        settings = f"{config.num_attention_heads} {config.hidden_act} {float(config.rms_norm_eps)}"
        return fingerprint(settings, *(values[name] for name in sorted(values)))

    def load(self, dtype: torch.dtype | None = None, attn_implementation="sdpa", device=CPU, four_bit: bool = False):
        """The model on the CPU, in evaluation mode; by default in the dtype of its weights.

        device: where it will compute. four_bit: hold the decoder's linear layers in four bits; it is then there already.
        Raises: UserError, also where the weights do not fit into the device's memory.
        """
        self.check()
        dtype = dtype or self.weights.dtype
        needed, free = self.weights.memory(dtype, device, four_bit), free_memory(device)
        if device.type == "cpu":
            needed *= int(os.environ.get("LOCAL_SIZE", 1))  # processes on this host, as the launcher says
        if needed > free:
            reason = f"its weights take {needed / 1e9:.3g} GB as {dtype}, and {device} has {free / 1e9:.3g} GB free"
            remedy = "take a device with more memory" + (", or add --load_in_4bit" if not four_bit else "")
            raise UserError(f"{self.path}: {reason}: {remedy}")
        settings = loading(dtype, device) if four_bit else {}
        with said_if_slow(f"reading {self.path}, {self.weights.bytes / 1e9:.3g} GB"):
            model = self._load(self.path, dtype=dtype, attn_implementation=attn_implementation, **settings)
        keep_as_loaded(model)
        model.generation_config = deepcopy(self.generation_config)
        return model

    def load_mapped(self):
        """The model as the mapped files themselves, which nothing copies: for comparisons, weight after weight."""
        return self._load(None, config=self.config, state_dict=dict(self.weights), dtype=self.weights.dtype)

    def _load(self, *source, **options):
        logging.set_verbosity_error()  # it would print a table of tensors that do not fit; an error names them
        logging.disable_progress_bar()  # most files are only mapped
        with blaming(f"{self.path}: the model cannot be loaded"):
            return self._kind.from_pretrained(*source, **options)

    def refuse_to_fail_later(self, model, adapter=None):
        """Generate a few tokens with `model`, this directory's, before anything slow.

        What is wrong with an adapter may turn out only then, and so does a release of transformers that treats the cache
        of keys and values in another way.

        Raises: UserError.
        """
        path, questions = adapter or self.path, ("你好", "你是谁？从哪里来？")
        prompts = [messages_to_ids(self.tokenizer, [{"role": "user", "content": text}]) for text in questions]
        training = model.training
        model.eval()
        task = f"comparing answers of {path} with and without the cache of keys and values"
        with said_if_slow(task), blaming(f"{path}: no answer can be generated with its weights"):
            error = cache_error(model, prompts, self.tokenizer.pad_token_id)
        model.train(training)
        if not error <= (1e-3 if model.dtype == torch.float32 else 0.2):  # measured: 4e-6 and 0.03; 1.5 without a cache
            raise UserError(
                f"{path}: under transformers {transformers.__version__} answers differ with and without the cache of "
                f"keys and values (by {error:.2g} of the logits' spread): pip install -r requirements.txt "
                "-c constraints.txt"
            )


def other_model(settings: dict) -> str | None:
    """What is wrong where config.json is of a model that would be computed wrongly, though its tensors may fit."""
    sizes = [settings.get(name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")]
    if settings.get("model_type") not in ("baichuan", "llama"):
        return f"is a model of the type {settings.get('model_type')}"
    if settings.get("quantization_config"):
        return "is quantised (--load_in_4bit quantises a model here)"
    if settings["model_type"] == "llama":
        return None
    if settings.get("vocab_size") == 64_000 or settings.get("architectures") == ["BaiChuanForCausalLM"]:
        return "is Baichuan 1, which has another tokenizer and another head"
    if sizes == [5120, 40, 40] or "max_position_embeddings" not in settings and sizes != [4096, 32, 32]:
        return "is Baichuan 13B, whose attention has ALiBi in place of rotary positions"
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    base = settings.get("rope_theta") or rope.get("rope_theta") or 10_000
    if base != 10_000 or rope.get("rope_type", rope.get("type", "default")) != "default":
        return "has other rotary positions (rope_theta, rope_scaling) than Baichuan2-7B"
    return None
