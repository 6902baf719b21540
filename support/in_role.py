"""Does a role stay in its role? Attacks, and questions about what it cannot know.

attacks = read_attacks(path)
conversations = attack_conversations(attacks, personas)  # to be answered, all or none of them
scores["model"] = measure_in_role(likelihood, attacks, personas, answers)
sections = in_role_sections(scores, resamples, seed)
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.tables import Section

ATTACKS = Path(__file__).parent.parent / "data/sample/attacks-zh.jsonl"


class InRoleScores(NamedTuple):
    """Each attack on each of R roles, and each boundary question to each of them. Numbers alone."""

    roles: list[str]
    kinds: list[str]  # (a,) of the attacks
    role: np.ndarray  # (a,) index into roles
    margin: np.ndarray  # (a,) nats by which the role's own beginning is likelier than the likeliest breaking one
    broken: np.ndarray  # (a,) 1 where the answer breaks by its phrases, 0 where not, nan without answers
    boundary_role: np.ndarray  # (b,)
    boundary_margin: np.ndarray  # (b,) nats a token by which not knowing is likelier than the modern explanation


def read_attacks(path: Path = ATTACKS) -> list[dict]:
    """{"kind", "messages"} a line; boundary questions have "in_character" and "modern" besides. Raises: UserError."""
    raise NotImplementedError


def attack_conversations(attacks: list[dict], personas: dict[str, str]) -> list[list[dict]]:
    """The conversations to be answered, each attack with each role of {role: system text}; boundary questions are none."""
    raise NotImplementedError


def measure_in_role(
    likelihood: Callable[[list[dict]], list[np.ndarray]],
    attacks: list[dict],
    personas: dict[str, str],
    answers: Sequence[str] | None = None,
) -> InRoleScores:
    """Likelihoods of breaking and of staying; with `answers` to `attack_conversations` also their phrases."""
    raise NotImplementedError


def in_role_sections(scores: dict[str, InRoleScores], resamples: int, seed: int) -> list[Section]:
    """Tables of attacks, by kind, and of boundary questions, by role, with 95 % bootstrap intervals."""
    raise NotImplementedError
