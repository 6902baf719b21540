"""How likely a model finds given answers: computed exactly, without drawing anything."""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from support.costs import MOST_TOKENS, row_cost

LOGITS = 2**25  # held at a time: 128 MB in float32, those of 266 tokens at the published vocabulary


class Likelihood:
    """Samples → the log-probabilities of their supervised tokens under a model, read without gradient.

    What samples share is computed once: they are laid out as trees, see `utils.tree_row`.

    Args:
        model: a BaichuanForCausalLM, a LLaMA, or one that PEFT has wrapped, in evaluation mode, on its device.
        tokenizer: has the turn markers.
        layout: the module `utils`, whose dataset and rows training uses too. It is handed in, since nothing in
            support/ imports a script.
        max_len, max_src_len: see `utils.RoleDataset`; by default what the model can read.
        packing, max_pack_len: see `utils.Collator`.
        show_progress: a bar over the rows.
    """

    def __init__(
        self,
        model,
        tokenizer,
        layout,
        max_len: int | None = None,
        max_src_len: int | None = None,
        packing: str = "tree",
        max_pack_len: int = MOST_TOKENS,
        show_progress: bool = False,
    ):
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model  # its layers hold adapters
        self.tokenizer, self.layout, self.show_progress = tokenizer, layout, show_progress
        longest = self.model.config.max_position_embeddings
        self.limits = (max_len or longest, max_src_len or longest)
        self.rows = (packing, max_pack_len, 4, row_cost(self.model.config, self.model.device))

    def __call__(self, samples: list[dict]) -> list[np.ndarray]:
        """Of each sample, in nats, the log-probability of every supervised token, the answer's eos last.

        A sample of which no supervised token fits into `max_len` gets an empty array.
        """
        data = self.layout.RoleDataset(samples, self.tokenizer, *self.limits)
        found = [np.empty(0)] * len(samples)
        if len(data):
            for index, losses in self._read(data, data.in_tree_order(np.arange(len(data)))):
                found[data.numbers[index] - 1] = losses
        return found

    def of_texts(self, texts: list[str]) -> list[np.ndarray]:
        """Of each text, which belongs to no conversation: the log-probability of every token but the first, up to `max_len`."""
        data = Texts([ids[: self.limits[0]] for ids in self.tokenizer.text_to_ids(texts)])
        return [losses for _, losses in self._read(data, np.arange(len(texts)))]

    def _read(self, data, order: np.ndarray):
        """Yield (index, log-probabilities) of the samples of `data` in this order."""
        batches = self.layout.Collator(data, *self.rows)(order)
        bar = tqdm(batches, "likelihoods", unit="row", leave=False, delay=2, disable=not self.show_progress)
        found = torch.cat([self._row(batch) for batch in bar]).double().cpu().numpy()
        ends = np.cumsum([len(data.sample(index)[1]) for index in order])
        yield from zip(order, np.split(found, ends[:-1]))

    @torch.no_grad()
    def _row(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """A row of the collator → the log-probabilities at its n loss positions: (n,) in float32."""
        inputs = self.layout.model_inputs(batch, self.model.device, self.model.config._attn_implementation)
        places, tokens = inputs.pop("loss_positions").unbind(-1)
        hidden_states = self.model.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[places]
        chunk = max(1, LOGITS // self.model.config.vocab_size)
        return torch.cat(
            [
                -F.cross_entropy(self.model.lm_head(states).float(), labels, reduction="none")
                for states, labels in zip(hidden_states.split(chunk), tokens.split(chunk))
            ]
        )


class Texts:
    """Texts as the collator takes samples: all tokens but the first are predicted."""

    def __init__(self, ids: list[list[int]]):
        self.ids = [np.array(row, dtype=np.int64) for row in ids]

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids = self.ids[index]
        return ids, np.stack((np.arange(len(ids) - 1), ids[1:]), axis=1)
