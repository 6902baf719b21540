"""Does the persona decide the words? Who said it, and what the persona is worth, from the model's own likelihoods.

likelihood = Likelihood(model, tokenizer, utils)
scores["model"] = measure_persona(likelihood, samples, kinds)
sections = persona_sections(scores, resamples, seed)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from support.tables import Section


class PersonaScores(NamedTuple):
    """The answers of n samples, read under the personas of R roles and under none. Numbers alone, cheap to keep."""

    roles: list[str]
    kinds: list[str]  # (n,) "role-specific", "general" or ""
    role: np.ndarray  # (n,) whose answer it is: index into roles
    question: np.ndarray  # (n,) answers to the same question have the same number
    tokens: np.ndarray  # (n,) supervised tokens, eos included
    nats: np.ndarray  # (n, R) log-likelihood under each role's persona
    without: np.ndarray  # (n,) log-likelihood under no persona


def measure_persona(
    likelihood: Callable[[list[dict]], list[np.ndarray]], samples: list[dict], kinds: Sequence[str] | None = None
) -> PersonaScores:
    """Read the answers of all samples under every role's persona.

    Args:
        likelihood: see support/likelihood.py.
        samples: as `read_samples` yields them.
        kinds: of each sample, such as predict.py's `question_kinds(data_dir)(sample["role"], sample["prompt"])`.
    """
    raise NotImplementedError


def persona_sections(scores: dict[str, PersonaScores], resamples: int, seed: int) -> list[Section]:
    """Tables of who said it, of who is heard, and of the persona's worth, with 95 % bootstrap intervals.

    Args:
        scores: of each model by its name, on the same samples; the others are compared with the first one.
    """
    raise NotImplementedError
