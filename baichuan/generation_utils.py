"""A conversation as token ids, and `chat()`: what is trained on is exactly what is asked later."""

import threading
from collections.abc import Iterator, Sequence
from copy import deepcopy
from queue import SimpleQueue
from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

ROLES = ("system", "user", "assistant")
# transformers 5.24 renamed the cache of keys and values, as an argument of `generate` and `forward` and in their results.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def messages_to_ids(
    tokenizer,
    messages: Sequence[dict],
    max_length: int | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Lay a conversation out as the model reads it.

        system text · user marker · user text · assistant marker · assistant text · user marker · …

    The system text is bare, no eos stands between turns, and text never becomes a marker. Training samples, the
    chat page and the evaluation all come through here.

    Args:
        tokenizer: its `text_to_ids` encodes the contents; it carries the turn markers.
        messages: `{"role": "system" | "user" | "assistant", "content": str}`; content may also be a list of ids,
            for a caller that has encoded (and cut) the text already. The system message, if any, comes first.
        max_length: tokens at most. Whole oldest rounds (a user's turn and its reply) go first, the system text
            always stays, and a last round that alone is too long loses its beginning.
        add_generation_prompt: end on the assistant marker when the last message is the user's.
    Raises:
        ValueError: a message is malformed, the markers are not known, or the system text leaves no room.
    """
    markers = turn_markers(tokenizer)
    system, rounds = [], []  # a round is the ids from one user turn up to the next
    for number, message in enumerate(messages):
        role, content = _role_and_content(message, number)
        ids = tokenizer.text_to_ids(content) if isinstance(content, str) else list(content)
        if role == "system":
            system = ids
        elif role == "user" or not rounds:
            rounds.append([markers[role], *ids])
        else:
            rounds[-1] += [markers[role], *ids]
    if add_generation_prompt and messages and messages[-1]["role"] == "user":
        rounds[-1].append(markers["assistant"])

    if max_length is not None:
        room = max_length - len(system)
        if rounds and room < 1:
            raise ValueError(
                f"the system text has {len(system)} tokens and leaves no room for a question in {max_length}"
            )
        while len(rounds) > 1 and sum(map(len, rounds)) > room:
            del rounds[0]
        if rounds:
            rounds[-1] = rounds[-1][-room:]
    return [*system, *(id for round_ids in rounds for id in round_ids)]


def turn_markers(holder) -> dict[str, int]:
    """The ids that open a user's and an assistant's turn, of a tokenizer or a generation_config.

    Raises:
        ValueError: it does not know them.
    """
    markers = {role: getattr(holder, f"{role}_token_id", None) for role in ("user", "assistant")}
    for role, marker in markers.items():
        if not isinstance(marker, int):
            raise ValueError(
                f"{role}_token_id is not known: take generation_config.json of Baichuan2-7B-Chat into its directory"
            )
    return markers


def _role_and_content(message: dict, number: int) -> tuple[str, str | Sequence[int]]:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise ValueError(f"message {number} must be a dict with role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {role!r}; known are {', '.join(ROLES)}")
    if role == "system" and number:
        raise ValueError("the system message must be the first")
    if not isinstance(content, (str, list, tuple)):
        raise ValueError(f"the content of message {number} must be text, not {type(content).__name__}")
    return role, content


# ---------------------------------------------------------------- many conversations → answers


class Answer(NamedTuple):
    text: str
    stopped: bool  # by itself, before max_new_tokens


@torch.no_grad()
def answer_batch(model, tokenizer, conversations: Sequence[list[dict]], generation_config) -> list[Answer]:
    """Answer several conversations side by side; each ends on a user's message, see `messages_to_ids`.

    Args:
        model: a BaichuanForCausalLM, or one that PEFT has wrapped, in evaluation mode.
        tokenizer: has the turn markers.
        generation_config: as `greedy` makes it, or the model's own.
    Raises:
        ValueError: malformed messages, or a system text that leaves no room.
    """
    room = model.config.model_max_length - generation_config.max_new_tokens
    prompts = [messages_to_ids(tokenizer, messages, max_length=room) for messages in conversations]
    ends = generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if generation_config == greedy(generation_config, generation_config.max_new_tokens):
        systems = [[message for message in messages[:1] if message["role"] == "system"] for messages in conversations]
        shared = [len(messages_to_ids(tokenizer, system)) for system in systems]
        found = greedy_ids(model, prompts, shared, generation_config.max_new_tokens, ends, tokenizer.pad_token_id)
    else:
        input_ids, mask = left_padded(prompts, tokenizer.pad_token_id, model.device)
        settings = deepcopy(generation_config)
        output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
        found = output[:, input_ids.shape[1] :].tolist()
    answers = []
    for ids in found:
        end = next((place for place, id in enumerate(ids) if id in ends), None)  # padding may follow it
        answers.append(Answer(tokenizer.decode(ids[:end], skip_special_tokens=True), end is not None))
    return answers


def left_padded(rows: Sequence[Sequence[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids → ids and mask, each (b, l): all rows end in the last column."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


class RoomyLayer(DynamicLayer):
    """The keys and values of a layer, with room behind them for the next tokens.

    DynamicLayer copies all that it holds at each token. On a CPU that takes a third of the time.
    """

    room = 64  # tokens
    blocks = None  # two tensors (b, h, tokens and room, d), of which `keys` and `values` are the beginnings

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, heads, new, size = key_states.shape
        start = self.get_seq_length()
        end = start + new
        if self.blocks is None or end > self.blocks[0].shape[2]:
            self.blocks = [
                states.new_empty(batch, heads, end + self.room, size) for states in (key_states, value_states)
            ]
            if start:
                self.blocks[0][:, :, :start] = self.keys
                self.blocks[1][:, :, :start] = self.values
        self.blocks[0][:, :, start:end] = key_states
        self.blocks[1][:, :, start:end] = value_states
        self.keys, self.values = (block[:, :, :end] for block in self.blocks)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor):
        super().batch_select_indices(indices)
        self.blocks = None


def greedy_ids(
    model, prompts, shared: Sequence[int], max_new_tokens: int, ends: list[int], pad: int
) -> list[list[int]]:
    """The most likely tokens after each prompt, up to the one that ends the answer, which is among them.

    `generate` gives the same tokens (`greedy`) and takes longer: here the persona is read once for all prompts that begin with
    it, and rows whose answers have ended leave the batch.

    Args:
        prompts: token ids.
        shared: of each prompt, how many of its first tokens are a persona; fewer than all.
    """
    cache = Cache(layer_class_to_replicate=RoomyLayer)

    def read(ids, mask):
        """Logits (b, V) of the last column. ids: (b, new tokens); mask: (b, tokens so far), of which ids are the last."""
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        tokens = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return model(**tokens, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache}).logits[:, -1]

    ids, mask = left_padded([prompt[count:] for prompt, count in zip(prompts, shared)], pad, model.device)
    personas = [tuple(prompt[:count]) for prompt, count in zip(prompts, shared)]
    if any(personas):
        distinct = list(dict.fromkeys(personas))
        persona_ids, persona_mask = left_padded(distinct, pad, model.device)
        read(persona_ids, persona_mask)
        own = torch.tensor([distinct.index(persona) for persona in personas], device=model.device)
        cache.batch_select_indices(own)
        mask = torch.cat((persona_mask[own], mask), dim=1)

    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompts that are still in the batch
    for _ in range(max_new_tokens):
        ids = read(ids, mask).argmax(-1, keepdim=True)  # (b, 1)
        for row, id in zip(rows, ids[:, 0].tolist()):
            if not answers[row] or answers[row][-1] not in ends:
                answers[row].append(id)
        going = [place for place, row in enumerate(rows) if answers[row][-1] not in ends]
        if not going:
            break
        if len(going) <= len(rows) * 7 // 8:  # to drop rows copies the others
            kept = torch.tensor(going, device=model.device)
            cache.batch_select_indices(kept)
            ids, mask, rows = ids[kept], mask[kept], [rows[place] for place in going]
        mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1)
    return answers


def greedy(generation_config: GenerationConfig, max_new_tokens: int) -> GenerationConfig:
    """The most likely token at each step and nothing else: the same answers every time."""
    return GenerationConfig(
        pad_token_id=generation_config.pad_token_id,
        eos_token_id=generation_config.eos_token_id,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,  # said expressly, since generate() takes what is left open from the model's own
    )


# ---------------------------------------------------------------- one conversation, as it is written


class ChatMixin:
    """Adds `chat()`, the published model's entry point, to a model with transformers' `generate`."""

    def chat(
        self,
        tokenizer,
        messages: Sequence[dict],
        stream: bool = False,
        generation_config: GenerationConfig | None = None,
    ) -> str | Iterator[str]:
        """Answer the last message.

        Args:
            messages: see `messages_to_ids`; the last one is the user's.
            stream: yield the answer so far each time it has grown, instead of returning it whole. Closing the
                generator stops the model.
            generation_config: defaults to the model's own.
        Raises:
            ValueError: malformed messages, or a question that cannot fit.
        """
        config = generation_config or self.generation_config
        if not messages or messages[-1].get("role") != "user":
            raise ValueError("the last message must be the user's")
        room = self.config.model_max_length - (config.max_new_tokens or 0)
        prompt = torch.tensor([messages_to_ids(tokenizer, messages, room)], device=self.device)
        if stream:
            return self.stream_answer(tokenizer, prompt, config)
        output = self.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)

    def stream_answer(self, tokenizer, prompt: torch.LongTensor, generation_config, **generate_kwargs) -> Iterator[str]:
        """Yield the answer so far while `generate` runs in a thread. prompt: (1, l) ids. Returns its last token.

        An exception in the thread (out of memory, say) is raised here; closing the generator stops the thread.
        """
        queue = SimpleQueue()  # of lists of new tokens; None at the end
        streamer = SimpleNamespace(put=lambda ids: queue.put(ids.tolist()), end=lambda: queue.put(None))
        stopped = threading.Event()
        failure = []

        def stop(input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

        def generate():
            try:
                self.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=deepcopy(generation_config),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stop]),
                    **generate_kwargs,
                )
            except BaseException as error:  # handed to the reader, who would otherwise wait for ever
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            answer, settled = "", ""  # settled: text that no further token changes
            pending: list[int] = []  # the tokens after it
            last = None
            tokens = iter(queue.get, None)
            next(tokens, None)  # generate() begins with the prompt
            for new in tokens:
                pending += new
                last = new[-1]
                text = settled + tokenizer.decode(pending, skip_special_tokens=True)
                if text != answer and not text.endswith("\ufffd"):  # that is a character whose bytes are still coming
                    answer = text
                    yield answer
                    if len(pending) > 64:
                        settled, pending = answer, []
            text = settled + tokenizer.decode(pending, skip_special_tokens=True)
            if text != answer:
                yield text
            if failure:
                raise failure[0]
            return last
        finally:
            stopped.set()
            thread.join()
