"""Tools around the model: samples → ids → rows with their mask, evaluation, and saving an adapter."""

import math
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

from baichuan.generation_utils import messages_to_ids
from support.dialogues.samples import is_trained
from support.files import whole_directory, writing
from support.model.adapter import write_training

# ---------------------------------------------------------------- samples → token ids


class RoleDataset:
    """Conversations as token ids with their loss positions; a persona that many samples share is held once.

    Sample i is the persona `personas[persona[i]]`, then `ids[starts[i]:starts[i + 1]]`: marker and text of each turn.
    Supervised are the assistant's turns and the eos that ends each of them. Each such token has a loss position, (the
    column that predicts it, the token); so no eos is among the ids, and no later turn sees one. In `loss_positions` columns
    count from the persona's end. `numbers[i]` is the sample's number in its file, from 1; `supervised[i]` counts its tokens.

    Args:
        samples: dicts with system and messages, such as `support.dialogues.samples.read_samples` yields.
        max_src_len: tokens of a question at most; its beginning is kept.
        max_len: tokens of a sample at most, persona and last eos included. A longer one loses whole oldest rounds, and
            then the end of its last answer, which gets no eos.
        is_skip: leave samples over either limit out instead of cutting them.
    """

    def __init__(self, samples, tokenizer, max_len: int, max_src_len: int, is_skip: bool = False):
        self.counts = Counter()  # what became of the samples
        self.personas: list[list[int]] = []
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_token_id
        self.max_src_len, self.is_skip = max_src_len, is_skip
        known: dict[str, int] = {}  # system text → its number in personas
        ids, starts, persona, numbers = array("i"), array("q", [0]), array("i"), array("i")
        loss_positions, loss_starts = array("i"), array("q", [0])
        for sample in encoded(samples, tokenizer):
            self.counts["read"] += 1
            system = sample["system"]
            if system not in known:
                known[system] = len(self.personas)
                self.personas.append(messages_to_ids(tokenizer, [{"role": "system", "content": system}]))
            messages, is_whole = self._fit(sample["messages"], max_len - len(self.personas[known[system]]))
            sample_ids, sample_loss_positions = self._lay_out(messages, is_whole)
            if sample_loss_positions:
                ids.extend(sample_ids)
                starts.append(len(ids))
                loss_positions.extend(chain.from_iterable(sample_loss_positions))
                loss_starts.append(len(loss_positions) // 2)
                persona.append(known[system])
                numbers.append(self.counts["read"])
        self.ids, self.starts = np.frombuffer(ids, "i"), np.frombuffer(starts, "q")
        self.loss_positions = np.frombuffer(loss_positions, "i").reshape(-1, 2)
        self.loss_starts = np.frombuffer(loss_starts, "q")
        self.persona, self.numbers = np.frombuffer(persona, "i"), np.frombuffer(numbers, "i")
        self.supervised = np.diff(self.loss_starts)
        self.counts["kept"] = len(self)

    def _fit(self, messages: list[dict], room: int) -> tuple[list[dict], bool]:
        """(messages up to the last trained answer that fits, cut to the limits; whether it is whole), or none."""
        trained = [number for number, turn in enumerate(messages) if is_trained(turn)]
        messages = messages[: max(trained, default=-1) + 1]  # nothing is learned from what follows
        questions = [turn for turn in messages if turn["role"] == "user"]
        long_question = any(len(turn["content"]) > self.max_src_len for turn in questions)
        for turn in questions:
            turn["content"] = turn["content"][: self.max_src_len]
        lengths = [1 + len(turn["content"]) for turn in messages]  # with their markers
        if self.is_skip and (long_question or sum(lengths) + 1 > room):
            self.counts["skipped"] += 1
            return [], False
        for last in reversed(trained):
            first, excess = 0, sum(lengths[: last + 1]) + 1 - room  # the last answer ends with an eos
            for number, turn in enumerate(messages[:last]):
                if excess > 0 and turn["role"] == "user" and number > 0:  # the round before it goes
                    excess -= sum(lengths[first:number])
                    first = number
            answer = messages[last]
            if len(answer["content"]) + 1 > excess:
                if excess > 0:
                    answer["content"] = answer["content"][: len(answer["content"]) - (excess - 1)]  # first goes the eos
                self.counts["cut questions"] += long_question
                self.counts["shortened conversations"] += first > 0 or last < trained[-1]
                self.counts["cut answers"] += excess > 0
                return messages[first : last + 1], excess <= 0
        self.counts["no room for an answer" if trained else "nothing to train"] += 1
        return [], False

    def _lay_out(self, messages: list[dict], is_whole: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Messages without their persona → (ids, loss positions). An answer that is not whole gets no eos."""
        ids, loss_positions = [], []
        for turn in messages:
            ids += messages_to_ids(self.tokenizer, [turn], add_generation_prompt=False)
            if is_trained(turn):
                answer = [*turn["content"], self.eos] if is_whole or turn is not messages[-1] else turn["content"]
                marker = len(ids) - len(turn["content"]) - 1  # predicts the first token; each predicts the next one
                loss_positions += enumerate(answer, start=marker)
        return ids, loss_positions

    def __len__(self) -> int:
        return len(self.persona)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids (l,), persona included; loss positions (n, 2)), both int64."""
        persona = self.personas[self.persona[index]]
        ids = np.concatenate((persona, self.ids[self.starts[index] : self.starts[index + 1]]))
        loss_positions = self.loss_positions[self.loss_starts[index] : self.loss_starts[index + 1]] + [len(persona), 0]
        return ids.astype(np.int64), loss_positions.astype(np.int64)

    def in_tree_order(self, indices: np.ndarray) -> np.ndarray:
        """Sorted by their ids, so that samples which begin alike lie side by side: the tree's leaves, depth first."""
        return np.array(sorted(indices, key=lambda index: self.sample(index)[0].astype(">i4").tobytes()), dtype=int)


def encoded(samples, tokenizer) -> Iterator[dict]:
    """The samples with ids in place of their texts. 4,096 are encoded at a time, which is faster than one by one."""
    samples = iter(samples)
    while chunk := list(islice(samples, 4096)):
        ids = iter(tokenizer.text_to_ids([turn["content"] for sample in chunk for turn in sample["messages"]]))
        for sample in chunk:
            yield {**sample, "messages": [{**turn, "content": next(ids)} for turn in sample["messages"]]}


# ---------------------------------------------------------------- a step's samples → tensors


def shared_beginning(first: np.ndarray, second: np.ndarray) -> int:
    """Tokens that two samples have in common from their start on."""
    length = min(len(first), len(second))
    (different,) = np.nonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def tree_row(samples: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Samples in tree order → one row (b = 1), in which everything that they share stands once.

    A row of a persona P with a question and b one answer, c another answer to it, d another question; and Q, another
    persona. What each token (down) sees (across):

            position   0  1  2  3  4  5  6  5  3  4  0  1  2
               token   P  P  P  a  a  b  b  c  d  d  Q  Q  e
                 end  10 10 10  8  8  7  7  8 10 10 13 13 13
                   P   ■  ·  ·  ·  ·  ·  ·  ·  ·  ·  ·  ·  ·
                   P   ■  ■  ·  ·  ·  ·  ·  ·  ·  ·  ·  ·  ·
                   P   ■  ■  ■  ·  ·  ·  ·  ·  ·  ·  ·  ·  ·
                   a   ■  ■  ■  ■  ·  ·  ·  ·  ·  ·  ·  ·  ·     a sees its persona and itself;
                   a   ■  ■  ■  ■  ■  ·  ·  ·  ·  ·  ·  ·  ·
                   b   ■  ■  ■  ■  ■  ■  ·  ·  ·  ·  ·  ·  ·
                   b   ■  ■  ■  ■  ■  ■  ■  ·  ·  ·  ·  ·  ·
                   c   ■  ■  ■  ■  ■  ·  ·  ■  ·  ·  ·  ·  ·     c sees the question, but never b,
                   d   ■  ■  ■  ·  ·  ·  ·  ·  ■  ·  ·  ·  ·     and its position goes on from a;
                   d   ■  ■  ■  ·  ·  ·  ·  ·  ■  ■  ·  ·  ·
                   Q   ·  ·  ·  ·  ·  ·  ·  ·  ·  ·  ■  ·  ·     another persona begins afresh.
                   Q   ·  ·  ·  ·  ·  ·  ·  ·  ·  ·  ■  ■  ·
                   e   ·  ·  ·  ·  ·  ·  ·  ·  ·  ·  ■  ■  ■

    Attention being causal, what the layers compute for a text does not depend on what follows it: losses and gradients
    are those of the samples one by one. The same idea: Tree Training (arXiv 2511.00413), Prefix Grouper (2506.05433).

    Returns: input_ids, position_ids and end (1, l), where `end` is the column at which a token's branch ends, see
    `tree_mask`; loss_positions (n, 2). A text that several samples supervise is listed once for each of them.
    """
    new_ids, positions, loss_positions = [], [], []
    branch_end = np.empty(0, dtype=np.int64)
    previous = columns = np.empty(0, dtype=np.int64)  # the ids of the sample before, and in which columns they stand
    for ids, targets in samples:
        shared, length = shared_beginning(previous, ids), len(branch_end)
        branch_end[columns[shared:]] = length  # these branches are over
        columns = np.append(columns[:shared], np.arange(length, length + len(ids) - shared))
        branch_end = np.append(branch_end, np.zeros(len(ids) - shared, dtype=np.int64))
        new_ids.append(ids[shared:])
        positions.append(np.arange(shared, len(ids)))
        loss_positions.append(np.stack((columns[targets[:, 0]], targets[:, 1]), axis=1))
        previous = ids
    branch_end[columns] = len(branch_end)
    row = {"input_ids": np.concatenate(new_ids), "position_ids": np.concatenate(positions), "end": branch_end}
    tensors = {name: torch.from_numpy(numbers)[None] for name, numbers in row.items()}
    return {**tensors, "loss_positions": torch.from_numpy(np.concatenate(loss_positions))}


def padded_batch(samples: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """One sample a row, padded on the right: input_ids (b, l), loss_positions (n, 2)."""
    # No mask is needed: attention being causal, no token sees what follows it, and padding has no loss.
    input_ids = pad_sequence([torch.from_numpy(ids) for ids, _ in samples], batch_first=True)
    length = input_ids.shape[1]
    loss_positions = np.concatenate([targets + [row * length, 0] for row, (_, targets) in enumerate(samples)])
    return {"input_ids": input_ids, "loss_positions": torch.from_numpy(loss_positions)}


def tree_mask(end: torch.Tensor, implementation: str = "sdpa"):
    """Who sees whom in a row of trees: token q sees token k if k ≤ q < end[k]; `end` (b, l) is that of `tree_row`.

    "sdpa" takes a (b, 1, l, l) mask, true where attention is allowed; "flex_attention" a BlockMask, whose empty blocks
    are never computed; "eager" a mask to be added.
    """
    length = end.shape[-1]
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def sees(b, h, query, key):
            return (key <= query) & (query < end[b, key])

        return create_block_mask(sees, len(end), None, length, length, device=end.device)
    column = torch.arange(length, device=end.device)
    query, key = column[:, None], column[None, :]
    mask = ((key <= query) & (query < end[:, None, :]))[:, None]  # (b, 1, l, l)
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min) if implementation == "eager" else mask


class Collator:
    """The samples of a step → one dict of tensors for each forward pass: trees, or padded batches (`packing="none"`).

    Args:
        max_pack_len: tokens of a row of trees at most. (Samples that are too long are RoleDataset's matter.)
        rows_per_batch: samples of a padded batch.
        cost: tokens of a row → its cost, see `support.device.row_cost`; by default rows are as few as possible.
    """

    def __init__(self, data: RoleDataset, packing: str, max_pack_len: int, rows_per_batch: int, cost=None):
        self.data, self.packing, self.rows_per_batch = data, packing, rows_per_batch
        self.max_pack_len, self.cost = max_pack_len, cost or (lambda length: 1)

    def __call__(self, indices: np.ndarray) -> list[dict[str, torch.Tensor]]:
        """`indices` are in tree order."""
        samples = [self.data.sample(index) for index in indices]
        if self.packing == "none":
            starts = range(0, len(samples), self.rows_per_batch)
            return [padded_batch(samples[start : start + self.rows_per_batch]) for start in starts]
        return [tree_row(row) for row in self._split_into_rows(samples)]

    def _split_into_rows(self, samples: list) -> list[list]:
        """Split a step into the rows of least total cost; what two rows share is computed in both.

        best[j] is the least cost of the first j samples, whose last row begins with sample split[j].
        """
        best, split = [0.0], [0]
        shared = [0] + [shared_beginning(a[0], b[0]) for a, b in zip(samples, samples[1:])]
        for j in range(1, len(samples) + 1):
            best.append(math.inf)
            split.append(j - 1)
            length = 0
            for i in range(j - 1, -1, -1):  # a row of samples i … j - 1
                length += len(samples[i][0]) - (shared[i + 1] if i < j - 1 else 0)
                if length > self.max_pack_len and i < j - 1:
                    break
                if best[i] + self.cost(length) < best[j]:
                    best[j], split[j] = best[i] + self.cost(length), i
        rows, j = [], len(samples)
        while j:
            rows.append(samples[split[j] : j])
            j = split[j]
        return rows[::-1]


class Steps(Dataset):
    """Item k, from 0, is what this process computes in step k + 1: (batches, supervised tokens of the whole step).

    Every process draws the same permutation of an epoch from the seed, so that all know each step's samples, `step_size`
    over all processes, without communicating, also after a resume. What an epoch leaves over differs from epoch to epoch.
    """

    def __init__(self, data: RoleDataset, collator: Collator, step_size: int, epochs: int, seed: int, rank=0, world=1):
        self.data, self.collator, self.step_size, self.rank, self.world = data, collator, step_size, rank, world
        self.steps_per_epoch = len(data) // step_size
        samples_per_epoch = self.steps_per_epoch * step_size
        orders = []
        for epoch in range(epochs):
            orders.append(np.random.default_rng([seed, epoch]).permutation(len(data))[:samples_per_epoch])
        self.order = np.concatenate(orders).reshape(-1, step_size)  # indices of each step's samples

    def __len__(self) -> int:
        return len(self.order)

    def name(self, done: int) -> str:
        """Of what is saved when so many steps are done."""
        return f"epoch-{(done - 1) // self.steps_per_epoch + 1}-step-{done}"

    def samples(self, k: int) -> np.ndarray:
        """Indices of item k's samples, in tree order, so that each process meets few personas."""
        return self.data.in_tree_order(self.order[k])

    def __getitem__(self, k: int):
        indices = self.samples(k)
        share = self.step_size // self.world
        batches = self.collator(indices[self.rank * share : (self.rank + 1) * share])
        return batches, int(self.data.supervised[indices].sum())


# ---------------------------------------------------------------- model


def model_inputs(batch: dict[str, torch.Tensor], device, implementation: str) -> dict:
    """A collator's batch → arguments of the model on its device, without waiting for the copies."""
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    if "end" in inputs:
        inputs["attention_mask"] = tree_mask(inputs.pop("end"), implementation)
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
    total = torch.zeros(2, dtype=torch.float64, device=device)  # loss, supervised tokens
    for batch in tqdm(batches, desc="evaluating", unit="row", leave=False, delay=2, disable=not show_progress):
        inputs = model_inputs(batch, device, implementation)
        total[0] += model(**inputs, use_cache=False, num_items_in_batch=1).loss
        total[1] += len(batch["loss_positions"])
    if dist.is_initialized():
        dist.all_reduce(total)
    model.train(training)
    return (total[0] / total[1]).item()


def save_model(model, tokenizer, directory: Path, base: str):
    """Write a plain PEFT adapter, the tokenizer, and the fingerprint of the base that it was trained on."""
    with whole_directory(directory, overwrite=True) as new, writing(directory):
        model.save_pretrained(new, save_embedding_layers=False)
        tokenizer.save_pretrained(new)
        write_training(new, base)
