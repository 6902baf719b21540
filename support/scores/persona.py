"""Does the persona decide the words? Who said it, and what the persona is worth, from the model's own likelihoods.

    said = read_personas(Likelihood(model, tokenizer), samples)
    scores = persona_scores(said)

The answer that was recorded for a role is read under the persona of every role. It counts as said by the role under
whose persona it is the likeliest: how often that is the role it was recorded for tells whether the persona decides the
words, exactly and without a judge.
"""

from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from support.dialogues.samples import first_question
from support.scores.likelihood import Likelihood
from support.scores.table import Items, Score, compare, numbered

MOST_ROLES = 12  # whose answers are read: each answer is read under all of them


class Said(NamedTuple):
    """The answers of n samples, read under the personas of R roles and under none."""

    roles: list[str]
    items: Items  # whose answers they are; clusters: conversations that begin with the same question
    own: np.ndarray  # (n, R) true for the role whose answer it is
    question: np.ndarray  # (n,) answers to the same question have the same number
    tokens: np.ndarray  # (n,) supervised tokens, eos included
    nats: np.ndarray  # (n, R) log-likelihood under each role's persona
    without: np.ndarray  # (n,) log-likelihood under no persona

    def confusion(self) -> np.ndarray:
        """(R, R): of the answers of role i the share heard as role j; nan without any."""
        with np.errstate(invalid="ignore"):
            return self.own.T @ heard(self.nats) / self.own.sum(axis=0)[:, None]

    def take(self, taken: np.ndarray) -> "Said":
        """Those of the answers alone, (n,) bool."""
        labels = [[label for label, own in zip(column, taken) if own] for column in self.items[:3]]
        items = Items(*labels, self.items.cluster[taken])
        return Said(self.roles, items, *(column[taken] for column in self[2:]))


def heard(nats: np.ndarray) -> np.ndarray:
    """(n, R) 1 for the role under whose persona an answer is the likeliest; equals share it."""
    likeliest = nats == nats.max(axis=1, keepdims=True)
    return likeliest / likeliest.sum(axis=1, keepdims=True)


def read_personas(likelihood: Likelihood, samples: list[dict]) -> Said:
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
    losses = likelihood(crossed)
    tokens = np.array([len(own) for own in losses]).reshape(len(samples), -1)
    nats = np.array([own.sum() for own in losses]).reshape(len(samples), -1)
    items = Items.of(samples, [first_question(sample["messages"]) for sample in samples])
    own = np.array([[role == sample["role"] for role in personas] for sample in samples])
    questions = numbered([tuple(turn["content"] for turn in sample["messages"][:-1]) for sample in samples])
    whole = (tokens[:, 0] > 0) & (tokens == tokens[:, :1]).all(axis=1)
    return Said(list(personas), items, own, questions, tokens[:, 0], nats[:, :-1], nats[:, -1]).take(whole)


def personas_of(samples: list[dict]) -> dict[str, str]:
    """The MOST_ROLES roles with the most samples, in the order of the samples: role → system text of most of them."""
    most = dict(Counter(sample["role"] for sample in samples).most_common(MOST_ROLES))
    systems = defaultdict(Counter)
    for sample in samples:
        if sample["role"] in most:
            systems[sample["role"]][sample["system"]] += 1
    return {role: own.most_common(1)[0][0] for role, own in systems.items()}


def who_said_it(said: Said, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accuracy, margin and chance, (n,) each, among the roles that have an answer among those taken, (n,) bool.

    The accuracy is 100 where an answer is likeliest under its own role's persona, else 0; the margin is by how many
    nats a token it is likelier so than under the best other persona. All nan where one role is alone.
    """
    here = said.own[taken].any(axis=0)
    if here.sum() < 2:
        nothing = np.full(len(taken), np.nan)
        return nothing, nothing, nothing
    own, nats = said.own[:, here], said.nats[:, here]
    accuracy = 100 * (own * heard(nats)).sum(axis=1)
    margin = ((own * nats).sum(axis=1) - np.where(own, -np.inf, nats).max(axis=1)) / said.tokens
    return accuracy, margin, np.full(len(taken), 100 / here.sum())


def accuracy_of(said: Said) -> Score:
    def among(taken):
        accuracy, _, chance = who_said_it(said, taken)
        return Score(said.items, accuracy, beside={"chance": chance})

    return Score(said.items, None, among=among)


def persona_scores(said: Said) -> dict[str, Score]:
    """Who said it, also of the questions that several roles answer, where others are there; what the persona is worth."""
    if not len(said.tokens):
        return {}
    items, tokens, own = said.items, said.tokens, (said.own * said.nats).sum(axis=1)
    scores = {
        "who_said_it": accuracy_of(said),
        "who_said_it_margin": Score(items, None, among=lambda taken: Score(items, who_said_it(said, taken)[1])),
        "loss": Score(items, -own / tokens, tokens),
        "worth_none": Score(items, (own - said.without) / tokens, tokens),
    }
    if len(said.roles) > 1:
        others = np.where(said.own, 0, said.nats).sum(axis=1) / (len(said.roles) - 1)
        scores["worth_another"] = Score(items, (own - others) / tokens, tokens)
    asked = defaultdict(set)  # question → the roles that answer it
    for question, role in zip(said.question, items.role):
        asked[question].add(role)
    shared = np.array([len(asked[question]) > 1 for question in said.question])
    if shared.any() and not shared.all():
        scores["who_said_it_shared"] = accuracy_of(said.take(shared))
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
        own = [sample for sample in samples if sample["role"] == role]
        chosen += own[:: max(1, len(own) // per_role)][:per_role]
    said = read_personas(Likelihood(model, tokenizer, *limits, shared=dist.is_initialized()), chosen)
    found = {row.measure: row.models[0].value for row in compare({"": persona_scores(said)}, resamples=0, seed=0)}
    names = {"who_said_it_accuracy": "who_said_it", "who_said_it_margin": "who_said_it_margin"}
    return {name: float(found[measure]) for name, measure in names.items() if measure in found}
