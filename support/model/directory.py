"""A model directory, opened and checked once: config.json, generation_config.json, tokenizer, weights."""

import json
from copy import deepcopy
from functools import cached_property
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer
from baichuan.generation_utils import messages_to_ids, turn_markers
from support.errors import Problems, UserError, blaming, few
from support.files import LFS_POINTER, fingerprint, kind_of_file, read_object
from support.model.comparison import cache_error
from support.model.four_bit import check_four_bit, keep_as_loaded, loading
from support.model.weights import Weights

NEEDED = {  # and where to get it
    "config.json": "",
    "generation_config.json": ": take the one of Baichuan2-7B-Chat, which says which tokens open a turn: "
    '"user_token_id": 195, "assistant_token_id": 196',
    "tokenizer.model": "",
}


class ModelDirectory:
    """A Baichuan2 model on disk, or the LLaMA that merge_params.py exports. Each part is read at its first use.

    Attributes:
        config, generation_config, tokenizer, weights: raise a UserError that names the file where it is not right.
    """

    def __init__(self, path):
        self.path = Path(path)

    def check(self, four_bit: bool = False, or_llama: bool = False) -> "ModelDirectory":
        """Open everything except the values of the weights. Raises: UserError with all that is missing or does not fit.

        or_llama: takes a LLaMA export as well, which other engines answer from and merge_params.py compares.
        """
        if not self.path.is_dir():
            raise UserError(
                f"{self.path}: there is no such directory; download the model to it, or make a small one: "
                "python3 -m support.model.stand_in"
            )
        if (self.path / "adapter_config.json").exists():
            remedy = "merge it into its base with merge_params.py first, or name the base here and it as --adapter_path"
            raise UserError(f"{self.path}: is an adapter: {remedy}")
        if (self.path / "config.json").is_file():
            self.refuse_other_models(or_llama)
        with Problems() as problems:
            for name, remedy in NEEDED.items():
                if not (self.path / name).is_file():
                    problems.append(f"{self.path}: {name} is missing{remedy}")
            weights = problems.of(lambda: self.weights)
        config, _ = self.config, self.tokenizer
        if config.num_hidden_layers > len(weights.tensors):  # even without values, many layers take memory
            raise UserError(
                f"{self.path}/config.json: asks for {config.num_hidden_layers} layers, the weights have fewer"
            )
        # Shapes without values: a damaged file may ask for more than the memory holds.
        with blaming(f"{self.path}/config.json: no model can be built from it"), torch.device("meta"):
            model = self._kind(config)
        if misfits := weights.problems(model):
            raise UserError(*few([f"{self.path}: {problem}" for problem in misfits]))
        if four_bit:
            check_four_bit(self)
        return self

    def refuse_other_models(self, or_llama: bool = False):
        """Raise UserError where config.json is of a model that would be computed wrongly, though its tensors may fit."""
        settings, published = self.settings, "take Baichuan2-7B-Chat, as it was published"
        sizes = [settings.get(name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")]
        kind = settings.get("model_type")
        if kind != "baichuan" and not (or_llama and kind == "llama"):
            problem = f"is a model of the type {kind}: name a Baichuan2 model; other engines and predict.py --engine take a LLaMA export"
        elif settings.get("quantization_config"):
            problem = f"is quantised: {published}; --load_in_4bit quantises it here"
        elif kind == "llama":
            return
        elif settings.get("vocab_size") == 64_000 or settings.get("architectures") == ["BaiChuanForCausalLM"]:
            problem = f"is Baichuan 1, which has another tokenizer and another head: {published}"
        elif sizes == [5120, 40, 40] or "max_position_embeddings" not in settings and sizes != [4096, 32, 32]:
            problem = f"is Baichuan 13B, whose attention has ALiBi in place of rotary positions: {published}"
        elif not has_plain_rotary_positions(settings):
            problem = f"has other rotary positions (rope_theta, rope_scaling) than Baichuan2-7B: {published}"
        else:
            return
        raise UserError(f"{self.path}: {problem}")

    @cached_property
    def settings(self) -> dict:
        """config.json as it stands."""
        return read_object(self.path / "config.json")

    @property
    def _kind(self):
        return LlamaForCausalLM if self.settings.get("model_type") == "llama" else BaichuanForCausalLM

    @cached_property
    def config(self) -> BaichuanConfig | LlamaConfig:
        self.refuse_other_models(or_llama=True)
        kind = self._kind.config_class
        with blaming(f"{self.path}/config.json: is no {kind.__name__}"):
            return kind.from_pretrained(self.path)

    @cached_property
    def generation_config(self) -> GenerationConfig:
        path = self.path / "generation_config.json"
        settings = read_object(path)
        with blaming(str(path)):
            config = GenerationConfig.from_dict(settings)
            turn_markers(config)
        if config.temperature == 0:  # how other programs say greedy; transformers divides by it
            config.update(do_sample=False, temperature=1.0, top_k=1)  # top_k for a caller who draws all the same
        for name in ("temperature", "top_p", "repetition_penalty"):
            if type(value := getattr(config, name)) is int:  # transformers would refuse a 2
                setattr(config, name, float(value))
        for name, value in vars(config).items():
            if name.endswith("_token_id") and value is not None:
                ids = value if name == "eos_token_id" and isinstance(value, list) and value else [value]
                if not all(type(id) is int and 0 <= id < self.config.vocab_size for id in ids):
                    raise UserError(f"{path}: {name} {value!r} is no token of the model")
        return config

    @cached_property
    def tokenizer(self) -> BaichuanTokenizer:
        markers, vocab_size = turn_markers(self.generation_config), self.config.vocab_size
        if (kind := kind_of_file(self.path / "tokenizer.model")) == LFS_POINTER:
            raise UserError(f"{self.path}/tokenizer.model: {kind}")
        with blaming(f"{self.path}: the tokenizer cannot be loaded"):
            tokenizer = BaichuanTokenizer.from_pretrained(self.path)
            if not tokenizer.text_to_ids("。") or not isinstance(tokenizer.init_kwargs.get("auto_map", {}), dict):
                raise ValueError("a file is damaged")
            json.dumps(tokenizer.init_kwargs, default=str, ensure_ascii=False).encode()  # as it will be saved
            if turn_markers(tokenizer) != markers:
                raise ValueError("generation_config.json and tokenizer_config.json name different turn markers")
            if len(tokenizer) != vocab_size:
                raise ValueError(f"it has {len(tokenizer)} tokens, config.json says {vocab_size}")
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

    def load(
        self,
        dtype: torch.dtype | None = None,
        attn_implementation: str = "sdpa",
        four_bit_on: torch.device | None = None,
    ):
        """The model on the CPU, in evaluation mode; by default in the dtype of its weights. Raises: UserError.

        four_bit_on: a device; the decoder's linear layers are then held in four bits, and the model is on that device.
        """
        self.check()
        logging.set_verbosity_error()  # it would print a table of tensors that do not fit; the check has named them
        dtype = dtype or self.weights.dtype
        four_bit = loading(dtype, four_bit_on) if four_bit_on else {}
        with blaming(f"{self.path}: the model cannot be loaded"):
            model = self._kind.from_pretrained(
                self.path, dtype=dtype, attn_implementation=attn_implementation, **four_bit
            )
        keep_as_loaded(model)
        model.generation_config = deepcopy(self.generation_config)
        return model

    def load_mapped(self):
        """The model as the mapped files themselves, which nothing copies: for a comparison, weight after weight."""
        self.check(or_llama=True)
        model = self._kind.from_pretrained(
            None, config=self.config, state_dict=dict(self.weights), dtype=self.weights.dtype
        )
        return model.eval()

    def refuse_to_fail_later(self, model, generation_config: GenerationConfig | None = None, adapter=None):
        """Generate a few tokens with `model`, this directory's, before anything slow.

        Settings of generation_config.json or of an adapter turn out wrong only then, and so does a release of
        transformers that treats the cache of keys and values in another way.

        Raises: UserError.
        """
        path = adapter or self.path
        prompts = [
            messages_to_ids(self.tokenizer, [{"role": "user", "content": question}])
            for question in ("你好", "你是谁？从哪里来？")
        ]
        ids = torch.tensor(prompts[:1], device=model.device)
        config = deepcopy(generation_config or self.generation_config)
        config.update(max_new_tokens=1)
        training = model.training
        model.eval()
        try:
            with blaming(f"{path}: no answer can be generated with its weights and settings"):
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
                error = cache_error(model, prompts, self.tokenizer.pad_token_id)
        finally:
            model.train(training)
        if not error <= (1e-3 if model.dtype == torch.float32 else 0.2):  # measured: 4e-6 and 0.03; 1.5 without a cache
            raise UserError(
                f"{path}: under transformers {transformers.__version__} answers differ with and without the cache of "
                f"keys and values (by {error:.2g} of the logits' spread): pip install -r requirements.txt "
                "-c constraints.txt"
            )


def has_plain_rotary_positions(settings: dict) -> bool:
    """Whether a config.json asks for the positions that are computed here: base 10,000, and nothing scaled."""
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        return False
    base = settings.get("rope_theta") or scaling.get("rope_theta") or 10_000
    return base == 10_000 and scaling.get("rope_type", scaling.get("type", "default")) == "default"
