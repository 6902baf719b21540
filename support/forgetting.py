"""What training has cost: the perplexity of plain text that belongs to no role.

scores["model"] = measure_plain_text(likelihood, read_plain_text(path))
sections = plain_text_sections(scores, resamples, seed)
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.errors import UserError
from support.intervals import compared
from support.json_files import read_text
from support.tables import Section

NOTE = (
    "perplexity: how many tokens the model hesitates between at each token of text that belongs to no role; lower is "
    "better, and a tuned model that has forgotten nothing stays where the base model is. loss: its logarithm, in nats a "
    "token. In brackets 95 % intervals."
)


class PlainTextScores(NamedTuple):
    """The paragraphs of a text, each by itself."""

    tokens: np.ndarray  # (n,) predicted tokens
    nats: np.ndarray  # (n,) log-likelihood


def read_plain_text(path: Path) -> list[str]:
    """The paragraphs of a UTF-8 file: its lines that are not blank. Raises: UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file: name a text in UTF-8")
    lines = [line.strip() for line in read_text(path, may_be_empty=True).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path}: holds no text: name another file")
    return lines


def measure_plain_text(likelihood, texts: list[str]) -> PlainTextScores:
    """`likelihood`: see support/likelihood.py. A paragraph longer than the model can read is cut there."""
    losses = likelihood.of_texts(texts)
    return PlainTextScores(np.array([len(own) for own in losses]), np.array([own.sum() for own in losses]))


def loss_and_perplexity(scores: PlainTextScores, counts: np.ndarray) -> np.ndarray:
    loss = -(scores.nats @ counts) / (scores.tokens @ counts)
    return np.array([loss, np.exp(min(loss, 700))])


def plain_text_sections(scores: dict[str, PlainTextScores], resamples: int, seed: int) -> list[Section]:
    """Perplexity of each model, with 95 % bootstrap intervals over paragraphs, compared with the first one."""
    first = next(iter(scores.values()))
    measured = first.tokens > 0  # a paragraph of one token predicts nothing
    rows = compared(
        scores,
        {"all": measured},
        loss_and_perplexity,
        np.arange(len(measured)),
        (".3f", ".2f"),
        resamples,
        seed,
    )
    rows = [["", "paragraphs", "loss", "perplexity"], *(row[1:] for row in rows)]
    return [Section("Plain text", rows, NOTE)]
