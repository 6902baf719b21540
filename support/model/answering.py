"""A batch of conversations → answers, as many side by side as the memory holds."""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import takewhile
from types import SimpleNamespace
from typing import NamedTuple

import torch
from tqdm import tqdm

from baichuan import BaichuanConfig, BaichuanForCausalLM  # first, since it refuses an untested transformers
from baichuan.generation_utils import messages_to_ids
from support.device import free_memory
from support.errors import first_line, out_of_memory

# isort: split
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.utils import logging

MOST_ROWS = {"cuda": 128, "cpu": 64}  # more give hardly more answers a second (measured on the CPU)


class Answer(NamedTuple):
    text: str
    stopped: bool  # by itself, before max_new_tokens


@torch.no_grad()
def answer_batch(model, tokenizer, conversations: Sequence[list[dict]], generation_config) -> list[Answer]:
    """Answer several conversations side by side; each ends on a user's message, see `messages_to_ids`.

    `model`, which PEFT may have wrapped, is in evaluation mode. `generation_config`: as `greedy` makes it, or the model's.

    Raises: ValueError: a system text leaves no room.
    """
    longest, ends = generation_config.max_new_tokens, end_ids(generation_config)
    room, pad = model.config.model_max_length - longest, tokenizer.pad_token_id
    prompts = [messages_to_ids(tokenizer, messages, max_length=room) for messages in conversations]
    if generation_config == greedy(generation_config, longest):
        systems = [[message for message in messages[:1] if message["role"] == "system"] for messages in conversations]
        shared = [len(messages_to_ids(tokenizer, system)) for system in systems]
        generated = greedy_ids(model, prompts, shared, longest, ends, pad)
    else:
        ids, mask = left_padded(prompts, pad, model.device)
        output = model.generate(ids, attention_mask=mask, generation_config=deepcopy(generation_config))
        generated = output[:, ids.shape[1] :].tolist()
    answers = []
    for ids in generated:
        answer_ids = list(takewhile(lambda id: id not in ends, ids))  # padding may follow the end
        text = tokenizer.decode(answer_ids, skip_special_tokens=True)
        answers.append(Answer(text, stopped=len(answer_ids) < len(ids)))
    return answers


def end_ids(generation_config: GenerationConfig) -> list[int]:
    """The tokens that end an answer; generation_config.json may name one or several."""
    ends = generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


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
    block = None  # (2, b, h, tokens and room, d), of which `keys` and `values` are the beginnings

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, heads, new, size = key_states.shape
        start = self.get_seq_length()
        end = start + new
        if self.block is None or end > self.block.shape[3]:
            self.block = key_states.new_empty(2, batch, heads, end + self.room, size)
            if start:
                self.block[0, :, :, :start] = self.keys
                self.block[1, :, :, :start] = self.values
        self.block[0, :, :, start:end] = key_states
        self.block[1, :, :, start:end] = value_states
        self.keys, self.values = self.block[:, :, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor):
        super().batch_select_indices(indices)
        self.block = None


def greedy_ids(model, prompts, shared, max_new_tokens: int, ends: list[int], pad: int) -> list[list[int]]:
    """The most likely tokens after each prompt, up to the one that ends the answer, which is among them.

    `generate` gives the same tokens (`greedy`) and takes longer: here the persona is read once for all prompts that begin with
    it, and rows whose answers have ended leave the batch.

    shared: of each prompt, how many of its first tokens are a persona; fewer than all.
    """
    cache = Cache(layer_class_to_replicate=RoomyLayer)

    def read(ids, mask):
        """Logits (b, V) of the last column. ids: (b, new tokens); mask: (b, tokens so far), of which ids are the last."""
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        tokens = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return model(**tokens, use_cache=True, logits_to_keep=1, cache=cache).logits[:, -1]

    ids, mask = left_padded([prompt[count:] for prompt, count in zip(prompts, shared)], pad, model.device)
    personas = [tuple(prompt[:count]) for prompt, count in zip(prompts, shared)]
    if any(personas):
        distinct = list(dict.fromkeys(personas))
        persona_ids, persona_mask = left_padded(distinct, pad, model.device)
        read(persona_ids, persona_mask)
        index = torch.tensor([distinct.index(persona) for persona in personas], device=model.device)
        cache.batch_select_indices(index)
        mask = torch.cat((persona_mask[index], mask), dim=1)

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
            index = torch.tensor(going, device=model.device)
            cache.batch_select_indices(index)
            ids, mask, rows = ids[index], mask[index], [rows[place] for place in going]
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


def unusable_settings(settings: dict, vocab_size: int) -> list[str]:
    """What is wrong with the settings of a generation_config.json: a line for each key with which nobody here can answer.

    They are tried on a model of two dimensions, as an answer is generated on the page (streamed, from a cache that is
    there already) and by `answer_batch` (several side by side, drawn).
    """
    ids, reader = torch.ones(2, 3, dtype=torch.long), SimpleNamespace(put=lambda ids: None, end=lambda: None)
    first_token_ends = {"stopping_criteria": [lambda ids, scores, **_: torch.ones(len(ids), dtype=torch.bool)]}

    def problem(settings: dict) -> str | None:
        streamed = {"streamer": reader, "cache": DynamicCache(config=model.config)}
        try:
            for rows, trial, options in ((1, settings, streamed), (2, settings | {"do_sample": True}, {})):
                tokens = {"input_ids": ids[:rows], "attention_mask": ids[:rows]}
                config = GenerationConfig.from_dict(trial)
                output = model.generate(**tokens, generation_config=config, **first_token_ends, **options)
                if not isinstance(output, torch.Tensor) or len(output) != rows:
                    raise ValueError("it gives other things than one answer to a question")
        except Exception as error:  # of whatever class transformers and torch have for it
            return first_line(error)

    sizes = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    logging.set_verbosity_error()  # of settings that do nothing it would tell at each trial
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        model = BaichuanForCausalLM(BaichuanConfig(vocab_size=vocab_size, **sizes)).eval()
        if not (together := problem(settings)):
            return []
        unusable = []
        for key, value in settings.items():
            if reason := problem({"eos_token_id": 2, "max_new_tokens": 1, key: value}):
                unusable.append(f"{key} = {json.dumps(value, ensure_ascii=False)} cannot be used here: {reason}")
    return unusable or [together]


def rows_that_fit(model, tokens: int) -> int:
    """How many rows of so many tokens can be answered side by side: their keys and values fit into half the free memory.

    The other half is for activations, and for the copy while a batch shrinks.
    """
    row = 2 * model.config.num_hidden_layers * model.config.hidden_size * model.dtype.itemsize * tokens
    return max(1, min(MOST_ROWS[model.device.type], free_memory(model.device) // 2 // row))


def in_batches(generate: Callable, numbers: Sequence[int], size: int, done) -> Iterator[tuple[list[int], list]]:
    """Yield batches of the numbers, `size` at most, with what `generate` makes of each; those that are `done` are left out.

    A batch that the memory does not hold is halved, and so are those after it.
    """
    start = 0
    while batch := list(numbers[start : start + size]):
        try:
            if not all(number in done for number in batch):
                yield batch, generate(batch)
            start += len(batch)
        except Exception as error:
            if not out_of_memory(error) or len(batch) == 1:
                raise
            size = (len(batch) + 1) // 2
            tqdm.write(f"too little memory for {len(batch)} questions side by side: going on with {size}")
