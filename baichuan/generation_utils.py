"""A conversation as token ids, and `chat()`: what is trained on is exactly what is asked later."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from copy import deepcopy

import torch
from transformers import GenerationConfig, StoppingCriteriaList, TextIteratorStreamer

ROLES = ("system", "user", "assistant")


def messages_to_ids(
    tokenizer, messages: Sequence[dict], max_length: int | None = None, add_generation_prompt: bool = True
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
            raise ValueError(f"the system text ({len(system)} tokens) leaves no room for a question in {max_length}")
        while len(rounds) > 1 and sum(map(len, rounds)) > room:
            del rounds[0]
        if rounds:
            rounds[-1] = rounds[-1][-room:]
    return [*system, *(id for round_ids in rounds for id in round_ids)]


def turn_markers(holder) -> dict[str, int]:
    """The ids that open a user's and an assistant's turn, of a tokenizer or a generation_config.

    Raises: ValueError: it does not know them.
    """
    markers = {role: getattr(holder, f"{role}_token_id", None) for role in ("user", "assistant")}
    for role, marker in markers.items():
        if not isinstance(marker, int):
            raise ValueError(f"{role}_token_id is not known: take generation_config.json of Baichuan2-7B-Chat, too")
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
            return self.stream(tokenizer, prompt, config)
        output = self.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)

    def stream(self, tokenizer, prompt: torch.LongTensor, generation_config, **generate_kwargs) -> Iterator[str]:
        """Yield the answer so far while `generate` runs in a thread. prompt: (1, l) ids. Returns its last token.

        An exception in the thread (out of memory, say) is raised here; closing the generator stops the thread.
        """
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        generated, stopped = Future(), threading.Event()

        def stop(input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

        def generate():
            try:
                ids = self.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=deepcopy(generation_config),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stop]),
                    **generate_kwargs,
                )
                generated.set_result(ids)
            except BaseException as error:  # handed to the reader, who would otherwise wait for ever
                generated.set_exception(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            answer = ""
            for text in streamer:
                if text:  # none while a word, or the bytes of a character, are still coming
                    answer += text
                    yield answer
            return generated.result()[0, -1].item()
        finally:
            stopped.set()
            thread.join()
