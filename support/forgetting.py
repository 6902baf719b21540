"""What training has cost: the perplexity of plain text that belongs to no role.

scores["model"] = measure_plain_text(likelihood, read_plain_text(path))
sections = plain_text_sections(scores, resamples, seed)
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.tables import Section


class PlainTextScores(NamedTuple):
    """The paragraphs of a text, each by itself."""

    tokens: np.ndarray  # (n,) predicted tokens
    nats: np.ndarray  # (n,) log-likelihood


def read_plain_text(path: Path) -> list[str]:
    """The paragraphs of a UTF-8 file: its lines that are not blank. Raises: UserError."""
    raise NotImplementedError


def measure_plain_text(likelihood, texts: list[str]) -> PlainTextScores:
    """`likelihood`: see support/likelihood.py."""
    raise NotImplementedError


def plain_text_sections(scores: dict[str, PlainTextScores], resamples: int, seed: int) -> list[Section]:
    """Perplexity of each model, with 95 % bootstrap intervals, compared with the first one."""
    raise NotImplementedError
