"""Tools around the model: samples → ids → rows with their mask, evaluation, and saving an adapter."""

import functools
from array import array
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

from baichuan.generation_utils import messages_to_ids
from support.files import checkpoints, remove_directory, whole_directory, writing

# ---------------------------------------------------------------- samples → token ids


class RoleDataset:
    """Samples as token ids, each persona held once: some 220 bytes a RoleBench sample.

    Sample i is `personas[persona[i]]`, then `ids[starts[i]:starts[i + 1]]`: the user marker, the question, the
    assistant marker, and from `answers[i]` on the answer with its eos. Only the answer and its eos are supervised.

    `numbers[i]` counts from 1 in the file, for messages.

    Args:
        samples: dicts with system, prompt and response, such as `data_helper.read_samples` yields.
        max_src_len: tokens of a question at most; its beginning is kept.
        max_len: tokens of a sample at most, persona included. An answer that had to be cut gets no eos.
        is_skip: leave samples over either limit out instead of cutting them.
    Attributes:
        counts: Counter of read, kept, skipped, cut questions, cut answers and samples with no room for an answer.
    """

    def __init__(self, samples, tokenizer, max_len: int, max_src_len: int, is_skip: bool = False):
        self.counts = Counter()
        self.personas: list[list[int]] = []
        self._layout = functools.partial(messages_to_ids, tokenizer)
        self._eos = tokenizer.eos_token_id
        self._limits = (max_len, max_src_len, is_skip)
        known: dict[str, int] = {}
        ids, starts, answers, persona, numbers = array("i"), array("q", [0]), array("i"), array("i"), array("i")
        samples = iter(samples)
        while chunk := list(islice(samples, 4096)):
            prompts = tokenizer.text_to_ids([sample["prompt"] for sample in chunk])
            responses = tokenizer.text_to_ids([sample["response"] for sample in chunk])
            for sample, prompt, response in zip(chunk, prompts, responses):
                system = sample["system"]
                if system not in known:
                    known[system] = len(self.personas)
                    self.personas.append(self._layout([{"role": "system", "content": system}]))
                question, answer = self._fit(len(self.personas[known[system]]), prompt, response)
                if answer:
                    ids.extend(question + answer)
                    starts.append(len(ids))
                    answers.append(len(question))
                    persona.append(known[system])
                    numbers.append(self.counts["read"])
        self.ids = np.frombuffer(ids, dtype=np.int32)
        self.starts = np.frombuffer(starts, dtype=np.int64)
        self.answers = np.frombuffer(answers, dtype=np.int32)
        self.persona = np.frombuffer(persona, dtype=np.int32)
        self.numbers = np.frombuffer(numbers, dtype=np.int32)
        self.counts["kept"] = len(self)

    def _fit(self, persona_length: int, prompt: list[int], response: list[int]) -> tuple[list[int], list[int]]:
        """Cut a sample to the limits: (ids before the answer, answer ids), the answer empty if it is left out."""
        max_len, max_src_len, is_skip = self._limits
        self.counts["read"] += 1
        question = self._layout([{"role": "user", "content": prompt[:max_src_len]}])
        answer = [*response, self._eos]
        room = max_len - persona_length - len(question)
        if is_skip and (len(prompt) > max_src_len or len(answer) > room):
            self.counts["skipped"] += 1
            return question, []
        if room < 1:
            self.counts["no room for an answer"] += 1
            return question, []
        self.counts["cut questions"] += len(prompt) > max_src_len
        self.counts["cut answers"] += len(answer) > room
        return question, answer[:room]

    def __len__(self) -> int:
        return len(self.persona)

    def sample(self, index: int) -> tuple[torch.Tensor, int]:
        """(ids after the persona, place of the first supervised one among them)."""
        ids = self.ids[self.starts[index] : self.starts[index + 1]]
        return torch.from_numpy(ids.astype(np.int64)), int(self.answers[index])

    def by_persona(self, indices: np.ndarray) -> np.ndarray:
        return indices[np.argsort(self.persona[indices], kind="stable")]

    def supervised_tokens(self, indices: np.ndarray) -> int:
        """Tokens of these samples that carry loss."""
        return int((self.starts[indices + 1] - self.starts[indices] - self.answers[indices]).sum())


# ---------------------------------------------------------------- a step's samples → tensors


class Collator:
    """Samples → rows for the model, with each persona computed once a row (`packing="prefix"`) or padded ("none").

    A prefix row of two personas P and Q with three samples, and what each token (down) sees (across):

            position  0 1 2 3 4 5 3 4 0 1 2 3
               token  P P P a a a b b Q Q c c
                  P   ■ · · · · · · · · · · ·
                  P   ■ ■ · · · · · · · · · ·
                  P   ■ ■ ■ · · · · · · · · ·
                  a   ■ ■ ■ ■ · · · · · · · ·      a sees its persona and itself;
                  a   ■ ■ ■ ■ ■ · · · · · · ·
                  a   ■ ■ ■ ■ ■ ■ · · · · · ·
                  b   ■ ■ ■ · · · ■ · · · · ·      b sees the same persona, but never a, and
                  b   ■ ■ ■ · · · ■ ■ · · · ·      its positions go on from the persona's end;
                  Q   · · · · · · · · ■ · · ·      another persona begins afresh.
                  Q   · · · · · · · · ■ ■ · ·
                  c   · · · · · · · · ■ ■ ■ ·
                  c   · · · · · · · · ■ ■ ■ ■

    Attention being causal, P's activations do not depend on what follows: losses and gradients are those of the
    padded batch.

    Args:
        max_pack_len: tokens of a prefix row at most. rows_per_batch: samples of a padded batch.
    """

    def __init__(self, data: RoleDataset, packing: str, max_pack_len: int, rows_per_batch: int):
        self.data = data
        self.packing = packing
        self.max_pack_len = max_pack_len
        self.rows_per_batch = rows_per_batch

    def __call__(self, indices: np.ndarray) -> list[dict[str, torch.Tensor]]:
        """Sample indices, those of a persona side by side → one dict of tensors for each forward pass."""
        if self.packing == "none":
            starts = range(0, len(indices), self.rows_per_batch)
            return [self._padded_batch(indices[start : start + self.rows_per_batch]) for start in starts]
        return [self._prefix_row(row) for row in self._rows(indices)]

    def _rows(self, indices) -> list[list[int]]:
        """Fill rows up to max_pack_len tokens; a persona that goes on in the next row is counted there again.

        A row takes several personas: one long pass through the weights is faster than several short ones (measured on
        two CPU cores, hidden 768: a fifth at eight samples a step).
        """
        rows, length, previous = [], self.max_pack_len, None
        for index in indices:
            persona = self.data.persona[index]
            tokens = int(self.data.starts[index + 1] - self.data.starts[index])
            prefix = len(self.data.personas[persona])
            needed = tokens + (prefix if persona != previous else 0)
            if length + needed > self.max_pack_len:
                rows.append([])
                length, needed = 0, tokens + prefix
            rows[-1].append(index)
            length, previous = length + needed, persona
        return rows

    def _prefix_row(self, row: list[int]) -> dict[str, torch.Tensor]:
        """One row (b = 1): input_ids and position_ids (1, l), segments (1, 2, l) for `prefix_mask`, loss_positions."""
        ids, positions, segments, loss_positions = [], [], [], []
        length, previous = 0, None
        for index in row:
            persona = int(self.data.persona[index])
            if persona != previous:
                prefix = torch.tensor(self.data.personas[persona], dtype=torch.long)
                prefix_segment, previous = len(ids), persona
                ids.append(prefix)
                positions.append(torch.arange(len(prefix)))
                segments.append(torch.full((2, len(prefix)), prefix_segment))
                length += len(prefix)
            sample, answer = self.data.sample(index)
            segments.append(torch.tensor([len(ids), prefix_segment])[:, None].expand(2, len(sample)))
            ids.append(sample)
            positions.append(torch.arange(len(prefix), len(prefix) + len(sample)))
            at = torch.arange(length + answer - 1, length + len(sample) - 1)  # each token is predicted one place before
            loss_positions.append(torch.stack((at, sample[answer:]), dim=-1))
            length += len(sample)
        return {
            "input_ids": torch.cat(ids)[None],
            "position_ids": torch.cat(positions)[None],
            "segments": torch.cat(segments, dim=1)[None],
            "loss_positions": torch.cat(loss_positions),
        }

    def _padded_batch(self, indices) -> dict[str, torch.Tensor]:
        """One sample a row, padded on the right: input_ids and attention_mask (b, l), loss_positions."""
        rows, answers = [], []
        for index in indices:
            prefix = torch.tensor(self.data.personas[self.data.persona[index]], dtype=torch.long)
            sample, answer = self.data.sample(index)
            rows.append(torch.cat((prefix, sample)))
            answers.append(len(prefix) + answer)
        input_ids = pad_sequence(rows, batch_first=True)
        places = [
            torch.stack((torch.arange(answer - 1, len(row) - 1) + i * input_ids.shape[1], row[answer:]), dim=-1)
            for i, (row, answer) in enumerate(zip(rows, answers))
        ]
        lengths = torch.tensor([len(row) for row in rows])
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_positions": torch.cat(places)}


def prefix_mask(segments: torch.Tensor, implementation: str = "sdpa"):
    """Who sees whom in a prefix row, in the form that an attention implementation takes.

    Args:
        segments: (b, 2, l) integers: the segment a token belongs to, and that of its persona.
        implementation: "sdpa" gives a (b, 1, l, l) mask, true where attention is allowed; "flex_attention" a
            BlockMask, whose empty blocks are never computed; "eager" a mask to be added.
    """
    own, persona = segments.unbind(1)
    length = own.shape[-1]

    def sees(b, h, query, key):
        return (key <= query) & ((own[b, key] == own[b, query]) | (own[b, key] == persona[b, query]))

    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(sees, len(own), None, length, length, device=own.device)
    place = torch.arange(length, device=own.device)
    batch = torch.arange(len(own), device=own.device)[:, None, None]
    mask = sees(batch, None, place[:, None], place[None, :])[:, None]  # (b, 1, l, l)
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min) if implementation == "eager" else mask


class Steps(Dataset):
    """Item k is what this process computes in step k of the run: (batches, supervised tokens of the whole step).

    Every process draws the same permutation of an epoch from the seed, so that all know each step's samples
    without communicating, also after a resume. The samples that an epoch leaves over differ from epoch to epoch.

    Args:
        step_size: samples of a step, over all processes.
    """

    def __init__(self, data: RoleDataset, collator: Collator, step_size: int, epochs: int, seed: int, rank=0, world=1):
        self.data, self.collator = data, collator
        self.step_size, self.epochs, self.seed = step_size, epochs, seed
        self.rank, self.world = rank, world
        self.steps_per_epoch = len(data) // step_size
        self._order = (None, None)  # the epoch, its permutation

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0

    def name(self, step: int) -> str:
        """Name of the directory for the adapter of step 1 … len(self)."""
        return f"epoch-{(step - 1) // self.steps_per_epoch + 1}-step-{step}"

    def samples(self, step: int) -> np.ndarray:
        """Indices of a step's samples, sorted by persona so that each process meets few of them."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.data)))
        indices = self._order[1][place * self.step_size : (place + 1) * self.step_size]
        return self.data.by_persona(indices)

    def __getitem__(self, step: int):
        indices = self.samples(step)
        share = self.step_size // self.world
        batches = self.collator(indices[self.rank * share : (self.rank + 1) * share])
        return batches, self.data.supervised_tokens(indices)


# ---------------------------------------------------------------- model


def model_inputs(batch: dict[str, torch.Tensor], device, implementation: str) -> dict:
    """A collator's batch → arguments of the model on its device, without waiting for the copies."""
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    if "segments" in inputs:
        inputs["attention_mask"] = prefix_mask(inputs.pop("segments"), implementation)
    return inputs


def find_all_linear_names(model: nn.Module) -> list[str]:
    """Names of the decoder's linear layers: all but the head, which is no part of `model.model`."""
    layers = model.model.named_modules()
    return sorted({name.rpartition(".")[2] for name, module in layers if isinstance(module, nn.Linear)})


@torch.no_grad()
def evaluation(model, batches, device, implementation: str, show_progress: bool = False) -> float:
    """Mean loss in nats over all supervised tokens of `batches` on all processes; perplexity is its exponential."""
    training = model.training
    model.eval()
    loss, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in tqdm(batches, desc="evaluating", unit="row", leave=False, delay=2, disable=not show_progress):
        inputs = model_inputs(batch, device, implementation)
        loss += model(**inputs, use_cache=False, num_items_in_batch=1).loss
        tokens += len(batch["loss_positions"])
    total = torch.stack((loss, torch.tensor(tokens, dtype=torch.float64, device=device)))
    if dist.is_initialized():
        dist.all_reduce(total)
    model.train(training)
    return (total[0] / total[1]).item()


# ---------------------------------------------------------------- what a run leaves on disk


def save_model(model, tokenizer, directory: Path, keep: int | None = None):
    """Write a plain PEFT adapter with the tokenizer it was trained under; keep only the newest `keep` beside it."""
    with whole_directory(directory, overwrite=True) as new, writing(directory):
        model.save_pretrained(new, save_embedding_layers=False)
        tokenizer.save_pretrained(new)
    for _, old in checkpoints(directory.parent)[: -keep if keep else 0]:
        remove_directory(old)
