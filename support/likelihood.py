"""How likely a model finds recorded answers: exact, without drawing anything."""

import numpy as np


class Likelihood:
    """Samples → the log-probabilities of their supervised tokens under a model, in one reading without gradient.

    What samples share is computed once: they are laid out as trees, see `utils.tree_row`.

    Args:
        model: a BaichuanForCausalLM, a LLaMA, or one that PEFT has wrapped, in evaluation mode, on its device.
        tokenizer: has the turn markers.
        layout: the module `utils`, whose dataset and rows training uses too. It is handed in, since nothing in
            support/ imports a script.
        max_len, max_src_len: see `utils.RoleDataset`; by default what the model can read.
        packing: "tree" or "none", see `utils.Collator`.
    """

    def __init__(
        self, model, tokenizer, layout, max_len: int | None = None, max_src_len: int | None = None, packing="tree"
    ):
        raise NotImplementedError

    def __call__(self, samples: list[dict]) -> list[np.ndarray]:
        """Of each sample, in nats, the log-probability of every supervised token, the answer's eos last.

        A sample of which no supervised token fits into `max_len` gets an empty array.
        """
        raise NotImplementedError

    def of_texts(self, texts: list[str]) -> list[np.ndarray]:
        """Of each text, which belongs to no conversation: the log-probability of every token but the first."""
        raise NotImplementedError
