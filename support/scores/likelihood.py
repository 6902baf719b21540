"""How likely a model finds given texts: computed exactly, without drawing anything. And the perplexity of plain text."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import utils
from support.device import MOST_TOKENS, row_cost
from support.dialogues.json_files import read_text
from support.scores.table import Items, Score

LOGITS = 2**25  # held at a time: 128 MB in float32, those of 266 tokens at the published vocabulary


class Likelihood:
    """Samples → the log-probabilities of their supervised tokens under a model, read without gradient.

    What samples share is computed once: they are laid out as trees, see `utils.tree_row`.

    Args:
        model: a BaichuanForCausalLM, a LLaMA, or one that PEFT has wrapped, in evaluation mode, on its device.
        max_len, max_src_len: see `utils.RoleDataset`; by default what the model can read.
        packing, max_pack_len: see `utils.Collator`.
        shared: the processes of a run share the rows; all of them call, with the same samples, and all get everything.
    """

    def __init__(
        self,
        model,
        tokenizer,
        max_len: int | None = None,
        max_src_len: int | None = None,
        packing: str = "tree",
        max_pack_len: int = MOST_TOKENS,
        show_progress: bool = False,
        shared: bool = False,
    ):
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model  # its layers hold adapters
        self.tokenizer, self.show_progress, self.shared = tokenizer, show_progress, shared
        longest = self.model.config.max_position_embeddings
        self.limits = (max_len or longest, max_src_len or longest)
        self.rows = (packing, max_pack_len, 4, row_cost(self.model.config, self.model.device))

    def __call__(self, samples: list[dict]) -> list[np.ndarray]:
        """Of each sample, in nats, the log-probability of every supervised token, the answer's eos last.

        A sample of which no supervised token fits into `max_len` gets an empty array.
        """
        data = utils.RoleDataset(samples, self.tokenizer, *self.limits)
        log_probs = [np.empty(0)] * len(samples)
        if len(data):
            for index, of_sample in self._read(data, data.in_tree_order(np.arange(len(data)))):
                log_probs[data.numbers[index] - 1] = of_sample
        return log_probs

    def of_texts(self, texts: list[str]) -> list[np.ndarray]:
        """Of each text, which belongs to no conversation: the log-probability of every token but the first, up to `max_len`."""
        data = Texts([np.array(ids[: self.limits[0]]) for ids in self.tokenizer.text_to_ids(texts)])
        return [of_text for _, of_text in self._read(data, np.arange(len(texts)))]

    def _read(self, data, order: np.ndarray):
        """An iterator over (index, log-probabilities) of the samples of `data`, in this order."""
        batches = utils.Collator(data, *self.rows)(order)
        rank = dist.get_rank() if self.shared else 0
        world_size = dist.get_world_size() if self.shared else 1
        bar = tqdm(batches, "likelihoods", unit="row", leave=False, delay=2, disable=not self.show_progress)
        rows = []
        for number, batch in enumerate(bar):
            if number % world_size == rank:
                rows.append(self._row(batch))
            else:
                rows.append(torch.zeros(len(batch["loss_positions"]), device=self.model.device))
        log_probs = torch.cat(rows).double()
        if self.shared:
            dist.all_reduce(log_probs)  # of each number all terms but one are 0, so the sum is exact
        ends = np.cumsum([len(data.sample(index)[1]) for index in order])
        return zip(order, np.split(log_probs.cpu().numpy(), ends[:-1]))

    @torch.no_grad()
    def _row(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """A row of the collator → the log-probabilities at its n loss positions: (n,) in float32."""
        inputs = utils.model_inputs(batch, self.model.device, self.model.config._attn_implementation)
        positions, tokens = inputs.pop("loss_positions").unbind(-1)
        hidden_states = self.model.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[positions]
        chunk = max(1, LOGITS // self.model.config.vocab_size)
        log_probs = []
        for states, labels in zip(hidden_states.split(chunk), tokens.split(chunk)):
            log_probs.append(-F.cross_entropy(self.model.lm_head(states).float(), labels, reduction="none"))
        return torch.cat(log_probs)


class Texts(NamedTuple):
    """Texts as the collator takes samples: all tokens but the first are predicted."""

    ids: list[np.ndarray]

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids = self.ids[index]
        return ids, np.stack((np.arange(len(ids) - 1), ids[1:]), axis=1)


def read_plain_text(path: Path) -> list[str]:
    """The paragraphs of a UTF-8 file: its lines that are not blank. Raises: UserError."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def plain_text_scores(likelihood: Likelihood, texts: list[str]) -> dict[str, Score]:
    """The perplexity of paragraphs that belong to no role, each read by itself. One of a single token predicts nothing."""
    losses = [-log_probs for log_probs in likelihood.of_texts(texts) if len(log_probs)]
    items = Items.of([{}] * len(losses), range(len(losses)))
    means, tokens = np.array([of_text.mean() for of_text in losses]), np.array([len(of_text) for of_text in losses])
    return {"perplexity": Score(items, means, tokens)}
