"""A model that answers one question at a time, keeps within its context, and reads a role's persona only once."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy

import torch
from peft import PeftModel
from transformers import DynamicCache

from baichuan.generation_utils import CACHE_NAME, messages_to_ids
from support.errors import UserError, out_of_memory
from support.model_directory import ModelDirectory, load_adapter

SHORTEST_REPLY = 16  # tokens; a question that leaves less room is too long


class TooLong(ValueError):
    """Persona and question leave no room for a reply. Attributes: needed (their tokens), context (the model's)."""

    def __init__(self, needed: int, context: int):
        super().__init__(f"persona and question have {needed:,} tokens, the model's context {context:,}: shorten them")
        self.needed, self.context = needed, context


class PrefixCaches:
    """Keys and values of what many prompts begin with, computed at its first use.

    Attention being causal, they do not depend on what follows. When all together have more than `max_tokens`
    tokens, the least recently used are dropped. At 7B in bfloat16 a token takes half a MiB.
    """

    def __init__(self, max_tokens: int = 4096):
        self.max_tokens = max_tokens
        self._caches = OrderedDict()  # (ids, variant) → cache

    @torch.no_grad()
    def get(self, model, ids: Sequence[int], variant=None) -> DynamicCache:
        """A copy for `generate(prompt, cache=…)`, which adds to it; the prompt begins with `ids`.

        variant: tells apart what one model computes in different states, such as its adapter on and off.
        """
        key = (tuple(ids), variant)
        if key not in self._caches:
            cache = DynamicCache(config=model.config)
            model.model(input_ids=torch.tensor([ids], device=model.device), **{CACHE_NAME: cache})
            self._caches[key] = cache
        self._caches.move_to_end(key)
        while len(self._caches) > 1 and sum(len(ids) for ids, _ in self._caches) > self.max_tokens:
            self._caches.popitem(last=False)
        return deepcopy(self._caches[key])

    def clear(self):
        self._caches.clear()


class Speaker:
    """Answers one question at a time; others wait their turn.

    Args:
        adapter: the PeftModel around `model`, for answers with and without it.
    """

    def __init__(self, model, tokenizer, adapter: PeftModel | None = None):
        self.model, self.tokenizer, self.adapter = model, tokenizer, adapter
        self.personas = PrefixCaches()
        self.turn = threading.Lock()

    @classmethod
    def load(cls, model_path, adapter_path, device: torch.device):
        """Weights keep the checkpoint's dtype, since 7B takes 15 GB in bfloat16 and 30 in float32.

        Only float16 becomes float32 on the CPU, where it is slow. Raises: UserError.
        """
        directory = ModelDirectory(model_path)
        model = directory.load()
        if device.type == "cpu" and model.dtype == torch.float16:
            model = model.float()
        adapter = load_adapter(model, adapter_path) if adapter_path else None  # its layers enter `model`
        try:
            model = model.to(device).eval()
            directory.refuse_to_fail_later(model, adapter=adapter_path)
        except torch.OutOfMemoryError as error:
            raise UserError(f"{device}: too little memory is free for {model_path}: give --device cpu") from error
        return cls(model, directory.tokenizer, adapter)

    def fit(self, messages: list[dict], wanted: int) -> tuple[list[int], int, bool]:
        """Share the context out: persona and question come first, then the reply, then the earlier rounds.

        Args:
            messages: first the persona, last the question.
            wanted: tokens of the reply, at most.
        Returns:
            the prompt's ids, the tokens that its reply may have, and whether the oldest rounds were left out.
        Raises:
            TooLong: the question does not fit.
        """
        context = self.model.config.model_max_length
        needed = len(messages_to_ids(self.tokenizer, [messages[0], messages[-1]]))
        room = min(wanted, context - needed)
        if room < min(wanted, SHORTEST_REPLY):
            raise TooLong(needed, context)
        whole = messages_to_ids(self.tokenizer, messages)
        prompt = messages_to_ids(self.tokenizer, messages, context - room)
        return prompt, room, len(prompt) < len(whole)

    def answer(self, messages: list[dict], settings: dict, base: bool = False) -> Iterator[str]:
        """Yield the answer so far. Closing the iterator stops the model, and lets the next question in.

        Args:
            messages: first the persona, last the question.
            settings: fields of GenerationConfig, and `seed`, None for a random one.
            base: answer as the model does without its adapter.
        Raises:
            TooLong: the question does not fit. MemoryError: the device's memory does not suffice.
        """
        ids, room, _ = self.fit(messages, settings["max_new_tokens"])
        fields = {name: value for name, value in settings.items() if name != "seed"} | {"max_new_tokens": room}
        if not settings["do_sample"]:
            fields |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # transformers' own: greedy has no use for them
        config = deepcopy(self.model.generation_config)
        config.update(**fields)
        prompt = torch.tensor([ids], device=self.model.device)
        with self.turn, self.adapter.disable_adapter() if base else nullcontext():
            torch.seed() if settings["seed"] is None else torch.manual_seed(settings["seed"])
            try:
                cache = self.personas.get(self.model, self.tokenizer.text_to_ids(messages[0]["content"]), base)
                yield from self.model.stream_answer(self.tokenizer, prompt, config, **{CACHE_NAME: cache})
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self.personas.clear()
                torch.cuda.empty_cache()
                raise MemoryError(str(error)) from None
