"""A model that answers one question at a time, keeps within its context, and reads a role's persona only once."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from copy import deepcopy

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import DynamicCache

from baichuan.generation_utils import CACHE_NAME, messages_to_ids
from support.errors import UserError, out_of_memory
from support.model.adapter import load_adapter
from support.model.directory import ModelDirectory

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
        self.stand_in, self.own_settings = hasattr(model.config, "stand_in"), model.generation_config
        self.personas = PrefixCaches()
        self.turn = threading.Lock()

    @classmethod
    def load(cls, model_path, adapter_path, device: torch.device, load_in_4bit: bool = False):
        """Weights keep the checkpoint's dtype, since 7B takes 15 GB in bfloat16 and 30 in float32; 5 in four bits.

        Only float16 becomes float32 on the CPU, where it is slow. Raises: UserError.
        """
        directory = ModelDirectory(model_path).check()
        slow = device.type == "cpu" and directory.weights.dtype == torch.float16
        model = directory.load(torch.float32 if slow else None, four_bit_on=device if load_in_4bit else None)
        adapter = load_adapter(model, adapter_path) if adapter_path else None  # its layers enter `model`
        try:
            model = model.to(device).eval()
            directory.refuse_to_fail_later(model, adapter=adapter_path)
        except torch.OutOfMemoryError as error:
            raise UserError(f"{device}: too little memory is free for {model_path}: give --device cpu") from error
        return cls(model, directory.tokenizer, adapter)

    def fit(self, messages: list[dict], wanted: int, begun: str = "") -> tuple[list[int], int, bool]:
        """Share the context out: persona and question come first, then the reply, then the earlier rounds.

        Args:
            messages: first the persona, last the question.
            wanted: tokens of the reply, at most.
            begun: the reply's beginning, when there is one to go on from.
        Returns:
            the prompt's ids, the tokens that its reply may have, and whether the oldest rounds were left out.
        Raises:
            TooLong: the question does not fit.
        """
        context = self.model.config.model_max_length
        begun = self.tokenizer.text_to_ids(begun)
        needed = len(messages_to_ids(self.tokenizer, [messages[0], messages[-1]])) + len(begun)
        room = min(wanted, context - needed)
        if room < min(wanted, SHORTEST_REPLY):
            raise TooLong(needed, context)
        whole = messages_to_ids(self.tokenizer, messages)
        prompt = messages_to_ids(self.tokenizer, messages, context - room - len(begun))
        return prompt + begun, room, len(prompt) < len(whole)

    def answer(
        self, messages: list[dict], settings: dict, base: bool = False, begun: str = "", strength: float = 1.0
    ) -> Iterator[tuple[str, str]]:
        """Yield the answer so far and its state: "stopped", and at last "done", or "cut" at its longest.

        Closing the iterator stops the model, and frees it.

        Args:
            messages: first the persona, last the question.
            settings: fields of GenerationConfig, and `seed`, -1 for a random one.
            base: answer as the model does without its adapter.
            begun: the answer's beginning, which the model goes on from, and which what is yielded begins with.
            strength: what the adapter's update is multiplied by.
        Raises:
            TooLong: the question does not fit. MemoryError: the device's memory does not suffice.
        """
        ids, room, _ = self.fit(messages, settings["max_new_tokens"], begun)
        fields = {name: value for name, value in settings.items() if name != "seed"} | {"max_new_tokens": room}
        if not settings["do_sample"]:
            fields |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # transformers' own: greedy has no use for them
        config = deepcopy(self.model.generation_config)
        config.update(**fields)
        prompt = torch.tensor([ids], device=self.model.device)
        strength = 0.0 if base else strength
        with self.turn, self.scaled(strength):
            torch.seed() if settings["seed"] == -1 else torch.manual_seed(settings["seed"])
            try:
                cache = self.personas.get(self.model, self.tokenizer.text_to_ids(messages[0]["content"]), strength)
                stream = self.model.stream_answer(self.tokenizer, prompt, config, **{CACHE_NAME: cache})
                text = begun
                with closing(stream):
                    while True:
                        text = begun + next(stream)
                        yield text, "stopped"
            except StopIteration as end:
                ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
                yield text, "done" if end.value in ends else "cut"
            except RuntimeError as error:
                self.free_memory(error)

    @torch.no_grad()
    def words(self, messages: list[dict], answer: str, strength: float = 1.0) -> list[tuple[str, float]]:
        """The pieces of an answer, each with log p(tuned) − log p(base), in nats, of its tokens.

        messages: first the persona, last the question. Raises: TooLong, MemoryError.
        """
        answer_ids = self.tokenizer.text_to_ids(answer)
        prompt, _, _ = self.fit(messages, len(answer_ids))
        ids = torch.tensor([prompt + answer_ids], device=self.model.device)
        of = []
        with self.turn:
            try:
                for scale in (strength, 0.0):
                    with self.scaled(scale):
                        logits = self.model(input_ids=ids, logits_to_keep=len(answer_ids) + 1).logits[0, :-1].float()
                    of.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0])
            except RuntimeError as error:
                self.free_memory(error)
        pieces, shown, gain = [], "", 0.0
        for number, difference in enumerate((of[0] - of[1]).tolist(), start=1):
            gain += difference
            text = self.tokenizer.decode(answer_ids[:number])
            if not text.endswith("\ufffd") or number == len(answer_ids):  # a character of several tokens is one piece
                pieces.append((text[len(shown) :], gain))
                shown, gain = text, 0.0
        return pieces

    def scaled(self, strength: float):
        """The model with its adapter's update multiplied by `strength`; 0 is the base model."""
        if self.adapter is None or strength == 1:
            return nullcontext()
        return self.adapter.disable_adapter() if strength == 0 else rescale_adapter_scale(self.adapter, strength)

    def free_memory(self, error: RuntimeError):
        """Raises: MemoryError for want of memory, the error itself for all else."""
        if not out_of_memory(error):
            raise error
        self.personas.clear()
        torch.cuda.empty_cache()
        raise MemoryError(str(error)) from None
