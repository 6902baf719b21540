"""Does the persona decide the words? Who said it, and what the persona is worth, from the model's own likelihoods.

    readings = read_personas(Likelihood(model, tokenizer), samples)
    scores = persona_scores(readings)

The answer that was recorded for a role is read under the persona of every role. It counts as said by the role under
whose persona it is the likeliest: how often that is the role it was recorded for tells whether the persona decides the
words, exactly and without a judge.
"""

from collections import Counter, defaultdict
from itertools import compress
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from support.dialogues.samples import first_question
from support.scores.likelihood import Likelihood
from support.scores.table import Items, Score, compare, numbered

MOST_ROLES = 12  # whose answers are read: each answer is read under all of them


class Readings(NamedTuple):
    """The answers of n samples, read under the personas of R roles and under none."""

    roles: list[str]
    items: Items  # whose answers they are; clusters: conversations that begin with the same question
    is_author: np.ndarray  # (n, R) true for the role whose answer it is
    question: np.ndarray  # (n,) answers to the same question have the same number
    tokens: np.ndarray  # (n,) supervised tokens, eos included
    nats: np.ndarray  # (n, R) log-likelihood under each role's persona
    without: np.ndarray  # (n,) log-likelihood under no persona

    def confusion(self) -> np.ndarray:
        """(R, R): of the answers of role i the share heard as role j; nan without any."""
        with np.errstate(invalid="ignore"):
            return self.is_author.T @ heard(self.nats) / self.is_author.sum(axis=0)[:, None]

    def select(self, selected: np.ndarray) -> "Readings":
        """Those of the selected answers alone, (n,) bool."""
        labels = [list(compress(column, selected)) for column in self.items[:3]]
        items = Items(*labels, self.items.cluster[selected])
        return Readings(self.roles, items, *(column[selected] for column in self[2:]))


def heard(nats: np.ndarray) -> np.ndarray:
    """(n, R) 1 for the role under whose persona an answer is the likeliest; equals share it."""
    likeliest = nats == nats.max(axis=1, keepdims=True)
    return likeliest / likeliest.sum(axis=1, keepdims=True)


def read_personas(likelihood: Likelihood, samples: list[dict]) -> Readings:
    """Read the answers of samples, as `read_samples` yields them, under every role's persona, and under none.

    Under its own persona a sample keeps its own system text, under another's it gets the one of `personas_of`. An answer
    that was cut compares nothing, and is left out.
    """
    personas = personas_of(samples)
    samples = [sample for sample in samples if sample["role"] in personas]
    crossed = []
    for sample in samples:
        for role, system in [*personas.items(), (None, "")]:
            crossed.append(sample if role == sample["role"] else {**sample, "system": system})
    log_probs = likelihood(crossed)
    tokens = np.array([len(of_answer) for of_answer in log_probs]).reshape(len(samples), -1)
    nats = np.array([of_answer.sum() for of_answer in log_probs]).reshape(len(samples), -1)
    items = Items.of(samples, [first_question(sample["messages"]) for sample in samples])
    is_author = np.array([[role == sample["role"] for role in personas] for sample in samples])
    questions = numbered([tuple(turn["content"] for turn in sample["messages"][:-1]) for sample in samples])
    whole = (tokens[:, 0] > 0) & (tokens == tokens[:, :1]).all(axis=1)
    readings = Readings(list(personas), items, is_author, questions, tokens[:, 0], nats[:, :-1], nats[:, -1])
    return readings.select(whole)


def personas_of(samples: list[dict]) -> dict[str, str]:
    """The MOST_ROLES roles with the most samples, in the order of the samples: role → system text of most of them."""
    most = dict(Counter(sample["role"] for sample in samples).most_common(MOST_ROLES))
    systems = defaultdict(Counter)
    for sample in samples:
        if sample["role"] in most:
            systems[sample["role"]][sample["system"]] += 1
    return {role: texts.most_common(1)[0][0] for role, texts in systems.items()}


class WhoSaidIt(NamedTuple):
    """Is an answer likeliest under its own role's persona? 100 or 0; as a margin, by how many nats a token it is likelier
    than under the best other persona. Only roles count that have an answer among those looked at.
    """

    readings: Readings
    margin: bool = False

    @property
    def items(self) -> Items:
        return self.readings.items

    def among(self, selected: np.ndarray) -> Score:
        """selected: (n,) bool. All is nan where one role is alone."""
        present = self.readings.is_author[selected].any(axis=0)
        is_author, nats = self.readings.is_author[:, present], self.readings.nats[:, present]
        if present.sum() < 2:
            return Score(self.items, np.full(len(selected), np.nan))
        if self.margin:
            best_other = np.where(is_author, -np.inf, nats).max(axis=1)
            return Score(self.items, ((is_author * nats).sum(axis=1) - best_other) / self.readings.tokens)
        accuracy = 100 * (is_author * heard(nats)).sum(axis=1)
        return Score(self.items, accuracy, beside={"chance": np.full(len(selected), 100 / present.sum())})


def persona_scores(readings: Readings) -> dict[str, Score | WhoSaidIt]:
    """Who said it, also of the questions that several roles answer, where others are there; what the persona is worth."""
    if not len(readings.tokens):
        return {}
    items, tokens = readings.items, readings.tokens
    own_nats = (readings.is_author * readings.nats).sum(axis=1)
    scores = {
        "who_said_it": WhoSaidIt(readings),
        "who_said_it_margin": WhoSaidIt(readings, margin=True),
        "loss": Score(items, -own_nats / tokens, tokens),
        "worth_none": Score(items, (own_nats - readings.without) / tokens, tokens),
    }
    if len(readings.roles) > 1:
        other_nats = np.where(readings.is_author, 0, readings.nats).sum(axis=1) / (len(readings.roles) - 1)
        scores["worth_another"] = Score(items, (own_nats - other_nats) / tokens, tokens)
    roles_of = defaultdict(set)  # question → the roles that answer it
    for question, role in zip(readings.question, items.role):
        roles_of[question].add(role)
    shared = np.array([len(roles_of[question]) > 1 for question in readings.question])
    if shared.any() and not shared.all():
        scores["who_said_it_shared"] = WhoSaidIt(readings.select(shared))
    return scores


def who_said_it_now(samples: list[dict], model, tokenizer, *limits) -> dict[str, float]:
    """Accuracy (in percent) and margin on a fixed slice of train.py's test samples, for TensorBoard; nothing for one role.

    The slice costs about a tenth of the evaluation: n answers of each of R roles are read R + 1 times, so that n is a
    tenth of the samples divided by R · (R + 1), or 2 where that is less; of RoleBench's 1,885 samples 45. Nothing is
    drawn, so training goes on as if nothing had been measured. The processes of a run share the reading.

    The model is in evaluation mode; limits: max_len and so on, see `Likelihood`.
    """
    roles = list(personas_of(samples))
    if len(roles) < 2:
        return {}
    per_role = max(2, len(samples) // (10 * len(roles) * (len(roles) + 1)))
    chosen = []
    for role in roles:
        of_role = [sample for sample in samples if sample["role"] == role]
        chosen += of_role[:: max(1, len(of_role) // per_role)][:per_role]
    readings = read_personas(Likelihood(model, tokenizer, *limits, shared=dist.is_initialized()), chosen)
    rows = compare({"": persona_scores(readings)}, resamples=0, seed=0)
    values = {row.measure: float(row.models[0].value) for row in rows}
    names = {"who_said_it_accuracy": "who_said_it", "who_said_it_margin": "who_said_it_margin"}
    return {name: values[measure] for name, measure in names.items() if measure in values}
