"""A model that answers one question at a time, keeps within its context, and reads a role's persona only once."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from copy import deepcopy

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import DynamicCache, GenerationConfig

from baichuan.generation_utils import messages_to_ids
from support.errors import UserError, out_of_memory
from support.model.adapter import load_adapter
from support.model.answering import end_ids, greedy
from support.model.directory import ModelDirectory

SHORTEST_REPLY = 16  # tokens; a question that leaves less room is too long


class TooLong(UserError):
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
        self.caches: dict[tuple, DynamicCache] = {}  # (ids, variant) → cache; the last used one is the last

    @torch.no_grad()
    def get(self, model, ids: Sequence[int], variant=None) -> DynamicCache:
        """A copy for `generate(prompt, cache=…)`, which adds to it; the prompt begins with `ids`.

        variant: tells apart what one model computes in different states, such as its adapter on and off.
        """
        key = (tuple(ids), variant)
        cache = self.caches.pop(key, None)
        if cache is None:
            cache = DynamicCache(config=model.config)
            model.model(input_ids=torch.tensor([ids], device=model.device), cache=cache)
        self.caches[key] = cache
        while len(self.caches) > 1 and sum(len(ids) for ids, _ in self.caches) > self.max_tokens:
            del self.caches[next(iter(self.caches))]
        return deepcopy(cache)


class Speaker:
    """Answers one question at a time; others wait their turn. adapter: the PeftModel around `model`, if there is one.

    Everywhere `messages` are first the persona, last the question, and `begun` is the beginning of a reply to go on
    from. Raised are TooLong, where they do not fit, and MemoryError, where the device's memory does not suffice.
    """

    def __init__(self, model, tokenizer, adapter: PeftModel | None = None):
        self.model, self.tokenizer, self.adapter = model, tokenizer, adapter
        self.stand_in, self.own_settings = hasattr(model.config, "stand_in"), model.generation_config
        model.generation_config = GenerationConfig()  # generate() would take from it what an answer leaves open
        self.personas = PrefixCaches()
        self.turn = threading.Lock()

    @classmethod
    def load(cls, model_path, adapter_path, device: torch.device, load_in_4bit: bool = False):
        """Weights keep the checkpoint's dtype, since 7B takes 15 GB in bfloat16 and 30 in float32; 5 in four bits.

        Only float16 becomes float32 on the CPU, where it is slow. Raises: UserError.
        """
        directory = ModelDirectory(model_path).check()
        slow = device.type == "cpu" and directory.weights.dtype == torch.float16
        model = directory.load(torch.float32 if slow else None, device=device, four_bit=load_in_4bit)
        adapter = load_adapter(model, adapter_path) if adapter_path else None  # its layers enter `model`
        model = model.to(device).eval()
        directory.refuse_to_fail_later(model, adapter=adapter_path)
        return cls(model, directory.tokenizer, adapter)

    def fit(self, messages: list[dict], wanted: int, begun: str = "") -> tuple[list[int], int, bool]:
        """Share the context out: persona and question come first, then the reply, then the earlier rounds.

        Returns: the prompt's ids, the tokens that its reply may have (`wanted` at most), and whether the oldest rounds
        were left out.
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

    def stream(self, messages: list[dict], settings: dict, begun="", strength=1.0) -> Iterator[tuple[str, str]]:
        """Yield the answer so far and its state: "stopped", and at last "done", or "cut" at its longest. It only grows.

        Closing the iterator stops the model, and frees it. What is yielded begins with `begun`.

        Args:
            settings: fields of GenerationConfig, and `seed`, -1 for a random one.
            strength: what the adapter's update is multiplied by; with 0 the base model answers.
        """
        ids, room, _ = self.fit(messages, settings["max_new_tokens"], begun)
        config = deepcopy(self.own_settings) if settings["do_sample"] else greedy(self.own_settings, room)
        config.update(**settings | {"max_new_tokens": room})
        prompt = torch.tensor([ids], device=self.model.device)
        with self.alone(strength):
            torch.seed() if settings["seed"] == -1 else torch.manual_seed(settings["seed"])
            cache = self.personas.get(self.model, self.tokenizer.text_to_ids(messages[0]["content"]), strength)
            text = begun
            try:
                with closing(self.model.stream(self.tokenizer, prompt, config, cache=cache)) as stream:
                    while True:
                        text = begun + next(stream)
                        yield text, "stopped"
            except StopIteration as end:
                yield text, "done" if end.value in end_ids(config) else "cut"

    @torch.no_grad()
    def words(self, messages: list[dict], answer: str, strength: float = 1.0) -> list[tuple[str, float]]:
        """The pieces of an answer, each with log p(tuned) − log p(base), in nats, of its tokens."""
        answer_ids = self.tokenizer.text_to_ids(answer)
        prompt, _, _ = self.fit(messages, len(answer_ids))
        ids = torch.tensor([prompt + answer_ids], device=self.model.device)
        log_p = []
        for scale in (strength, 0.0):
            with self.alone(scale):
                logits = self.model(input_ids=ids, logits_to_keep=len(answer_ids) + 1).logits[0, :-1].float()
                log_p.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0])
        pieces, shown, gain = [], "", 0.0
        for number, difference in enumerate((log_p[0] - log_p[1]).tolist(), start=1):
            gain += difference
            text = self.tokenizer.decode(answer_ids[:number])
            if not text.endswith("\ufffd") or number == len(answer_ids):  # a character of several tokens is one piece
                pieces.append((text[len(shown) :], gain))
                shown, gain = text, 0.0
        return pieces

    @contextmanager
    def alone(self, strength: float):
        """The model for one caller, its adapter's update multiplied by `strength`."""
        scaled = nullcontext()
        if self.adapter is not None and strength != 1:
            scaled = rescale_adapter_scale(self.adapter, strength) if strength else self.adapter.disable_adapter()
        with self.turn, scaled:
            try:
                yield
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self.personas.caches.clear()
                torch.cuda.empty_cache()
                raise MemoryError(str(error)) from None
