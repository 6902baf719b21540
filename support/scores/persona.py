"""Does the persona decide the words? Who said it, and what the persona is worth, from the model's own likelihoods.

    said = read_personas(Likelihood(model, tokenizer), samples)
    scores = persona_scores(said)

The answer that was recorded for a role is read under the persona of every role. It counts as said by the role under
whose persona it is the likeliest: how often that is the role it was recorded for tells whether the persona decides the
words, exactly and without a judge.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from support.dialogues.samples import first_question
from support.scores.likelihood import Likelihood
from support.scores.table import MEASURES, Items, Score, means, numbered

MOST_ROLES = 12  # whose answers are read: each answer is read under all of them


class Said(NamedTuple):
    """The answers of n samples, read under the personas of R roles and under none. Numbers alone, cheap to keep."""

    roles: list[str]
    items: Items  # whose answers they are; clusters: conversations that begin with the same question
    role: np.ndarray  # (n,) whose answer it is: index into roles
    question: np.ndarray  # (n,) answers to the same question have the same number
    tokens: np.ndarray  # (n,) supervised tokens, eos included
    nats: np.ndarray  # (n, R) log-likelihood under each role's persona
    without: np.ndarray  # (n,) log-likelihood under no persona

    def own(self) -> np.ndarray:
        """(n,) log-likelihood under the persona of the role whose answer it is."""
        return np.take_along_axis(self.nats, self.role[:, None], axis=1)[:, 0]

    def others(self) -> np.ndarray:
        """(n, R − 1) log-likelihood under the personas of the other roles."""
        return self.nats[np.arange(len(self.roles)) != self.role[:, None]].reshape(len(self.role), -1)

    def heard(self) -> np.ndarray:
        """(n, R) 1 for the role under whose persona the answer is the likeliest; equals share it."""
        likeliest = self.nats == self.nats.max(axis=1, keepdims=True)
        return likeliest / likeliest.sum(axis=1, keepdims=True)

    def confusion(self) -> np.ndarray:
        """(R, R): of the answers of role i the share heard as role j; nan without any."""
        own = np.arange(len(self.roles))[:, None] == self.role  # (R, n)
        with np.errstate(invalid="ignore"):
            return own @ self.heard() / own.sum(axis=1, keepdims=True)

    def shared(self) -> np.ndarray:
        """(n,) true for answers to a question that several roles answer: the content being asked for is the same."""
        pairs = np.unique(np.stack((self.question, self.role)), axis=1)
        return np.bincount(pairs[0], minlength=self.question.max(initial=-1) + 1)[self.question] > 1

    def take(self, taken: np.ndarray) -> "Said":
        """Those of the answers alone, (n,) bool."""
        labels = [[label for label, own in zip(column, taken) if own] for column in self.items[:3]]
        items = Items(*labels, self.items.cluster[taken])
        return Said(self.roles, items, *(column[taken] for column in self[2:]))

    def among(self, taken: np.ndarray) -> "Said":
        """The same with fewer roles and personas: those that have an answer among the taken ones, (n,) bool.

        The answers of other roles stay in the arrays, where they mean nothing.
        """
        present = np.unique(self.role[taken])
        roles, own = [self.roles[number] for number in present], np.searchsorted(present, self.role)
        return self._replace(roles=roles, role=own.clip(max=len(present) - 1), nats=self.nats[:, present])


def read_personas(likelihood: Callable[[list[dict]], list[np.ndarray]], samples: list[dict]) -> Said:
    """Read the answers of all samples under every role's persona, and under none.

    Of more than MOST_ROLES roles, those with the most samples are read. Under its own persona a sample keeps its own
    system text, under another's it gets the one of `personas_of`. An answer that was cut compares nothing, and is left out.

    Args:
        likelihood: see support/scores/likelihood.py.
        samples: as support.dialogues.samples.read_samples yields them; with "kind" and "round" of their question, where they are
            known.
    """
    personas = personas_of(samples)
    roles, samples = list(personas), [sample for sample in samples if sample["role"] in personas]
    crossed = []
    for sample in samples:
        systems = [sample["system"] if role == sample["role"] else text for role, text in personas.items()]
        crossed += [{**sample, "system": system} for system in [*systems, ""]]
    losses = likelihood(crossed)
    tokens = np.array([len(own) for own in losses]).reshape(len(samples), len(roles) + 1)
    nats = np.array([own.sum() for own in losses]).reshape(len(samples), len(roles) + 1)
    items = Items.of(samples, [first_question(sample["messages"]) for sample in samples])
    questions = [tuple(turn["content"] for turn in sample["messages"][:-1]) for sample in samples]
    role = np.array([roles.index(sample["role"]) for sample in samples], dtype=int)
    whole = (tokens[:, 0] > 0) & (tokens == tokens[:, :1]).all(axis=1)
    return Said(roles, items, role, numbered(questions), tokens[:, 0], nats[:, :-1], nats[:, -1]).take(whole)


def personas_of(samples: list[dict]) -> dict[str, str]:
    """The MOST_ROLES roles with the most samples, in the order of the samples: role → system text of most of them."""
    most = [role for role, _ in Counter(sample["role"] for sample in samples).most_common(MOST_ROLES)]
    roles = dict.fromkeys(sample["role"] for sample in samples if sample["role"] in most)
    systems = {role: Counter(sample["system"] for sample in samples if sample["role"] == role) for role in roles}
    return {role: own.most_common(1)[0][0] for role, own in systems.items()}


# ---------------------------------------------------------------- scores


def who_said_it(said: Said, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Who said it, asked among the roles that have an answer among the taken ones.

    Returns:
        accuracy (n,): 100 where an answer is likeliest under its own role's persona, else 0; margin (n,): by how many
        nats a token it is likelier so than under the best other persona; {"chance": (n,)}. nan where one role is alone.
    """
    here = said.among(taken)
    if len(here.roles) < 2:
        nothing = np.full(len(taken), np.nan)
        return nothing, nothing, {}
    accuracy = 100 * np.take_along_axis(here.heard(), here.role[:, None], axis=1)[:, 0]
    margin = (here.own() - here.others().max(axis=1)) / here.tokens
    return accuracy, margin, {"chance": np.full(len(taken), 100 / len(here.roles))}


def persona_scores(said: Said) -> dict[str, Score]:
    """Who said it, also of the questions that several roles answer, where others are there; what the persona is worth."""
    if not len(said.role):
        return {}

    def accuracy(said: Said) -> Score:
        def among(taken):
            found, _, chance = who_said_it(said, taken)
            return found, chance

        return Score(said.items, None, among=among)

    def margin(taken):
        _, found, _ = who_said_it(said, taken)
        return found, {}

    items, own, tokens = said.items, said.own(), said.tokens
    scores = {
        "who_said_it": accuracy(said),
        "who_said_it_margin": Score(items, None, among=margin),
        "loss": Score(items, -own / tokens, tokens),
        "worth_none": Score(items, (own - said.without) / tokens, tokens),
    }
    if len(said.roles) > 1:
        scores["worth_another"] = Score(items, (own - said.others().mean(axis=1)) / tokens, tokens)
    shared = said.shared()
    if shared.any() and not shared.all():
        scores["who_said_it_shared"] = accuracy(said.take(shared))
    return scores


# ---------------------------------------------------------------- while training


def who_said_it_now(samples: list[dict], model, tokenizer, *limits) -> dict[str, float]:
    """Accuracy (in percent) and margin on a fixed slice of train.py's test samples, for TensorBoard; nothing for one role.

    The slice costs about a tenth of the evaluation: n answers of each of R roles are read R + 1 times, so that n is a
    tenth of the samples divided by R · (R + 1), or 2 where that is less; of RoleBench's 1,885 samples 45. Nothing is
    drawn, so training goes on as if nothing had been measured. The processes of a run share the reading.

    Args:
        model: in evaluation mode.
        limits: max_len and so on, see `Likelihood`.
    """
    roles = list(personas_of(samples))
    if len(roles) < 2:
        return {}
    per_role = max(2, len(samples) // (10 * len(roles) * (len(roles) + 1)))
    chosen = []
    for role in roles:
        own = [sample for sample in samples if sample["role"] == role]
        every = max(1, len(own) // per_role)
        chosen += own[::every][:per_role]
    likelihood = Likelihood(model, tokenizer, *limits, shared=dist.is_initialized())
    said = read_personas(likelihood, chosen)
    if not len(said.role):
        return {}
    everything = np.ones(len(said.role), dtype=bool)
    accuracy, margin, _ = who_said_it(said, everything)
    if np.isnan(accuracy).any():
        return {}
    numbers = means(MEASURES["who_said_it"], [(accuracy, 1.0), (margin, 1.0)], said.items.role, [everything])[0]
    return dict(zip(("who_said_it_accuracy", "who_said_it_margin"), map(float, numbers)))
