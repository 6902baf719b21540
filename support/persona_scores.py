"""Does the persona decide the words? Who said it, and what the persona is worth, from the model's own likelihoods.

    likelihood = Likelihood(model, tokenizer, utils)
    scores["model"] = measure_persona(likelihood, samples, kinds)
    sections = persona_sections(scores, resamples, seed)

The answer that was recorded for a role is read under the persona of every role. It counts as said by the role under
whose persona it is the likeliest: how often that is the role it was recorded for tells whether the persona decides the
words, exactly and without a judge.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from support.intervals import compared, numbered
from support.likelihood import Likelihood
from support.samples import first_question
from support.tables import Section

MOST_ROLES = 12  # whose answers are read: each answer is read under all of them


class PersonaScores(NamedTuple):
    """The answers of n samples, read under the personas of R roles and under none. Numbers alone, cheap to keep."""

    roles: list[str]
    kinds: list[str]  # (n,) "role-specific", "general", … or ""
    role: np.ndarray  # (n,) whose answer it is: index into roles
    question: np.ndarray  # (n,) answers to the same question have the same number
    opening: np.ndarray  # (n,) and so have those of conversations that begin with the same question
    tokens: np.ndarray  # (n,) supervised tokens, eos included
    nats: np.ndarray  # (n, R) log-likelihood under each role's persona
    without: np.ndarray  # (n,) log-likelihood under no persona

    def own(self) -> np.ndarray:
        """(n,) log-likelihood under the persona of the role whose answer it is."""
        return np.take_along_axis(self.nats, self.role[:, None], axis=1)[:, 0]

    def others(self) -> np.ndarray:
        """(n, R − 1) log-likelihood under the personas of the other roles."""
        return self.nats[np.arange(len(self.roles)) != self.role[:, None]].reshape(len(self.role), -1)

    def among(self, taken: np.ndarray) -> "PersonaScores":
        """The same with those roles alone, and their personas, that have an answer among those taken, (n,) bool.

        The answers of other roles stay, and are not to be looked at.
        """
        present = np.unique(self.role[taken])
        roles, own = [self.roles[number] for number in present], np.searchsorted(present, self.role)
        return self._replace(roles=roles, role=own.clip(max=len(present) - 1), nats=self.nats[:, present])

    def heard(self) -> np.ndarray:
        """(n, R) 1 for the role under whose persona the answer is the likeliest; equals share it."""
        likeliest = self.nats == self.nats.max(axis=1, keepdims=True)
        return likeliest / likeliest.sum(axis=1, keepdims=True)

    def confusion(self, taken: np.ndarray | None = None) -> np.ndarray:
        """(R, R): of the answers of role i (of those in `taken`, (n,) bool) the share heard as role j; nan without any."""
        taken = np.ones(len(self.role), dtype=bool) if taken is None else taken
        own = (np.arange(len(self.roles))[:, None] == self.role) & taken  # (R, n)
        with np.errstate(invalid="ignore"):
            return own @ self.heard() / own.sum(axis=1, keepdims=True)

    def shared(self) -> np.ndarray:
        """(n,) true for answers to a question that several roles answer: the content being asked for is the same."""
        pairs = np.unique(np.stack((self.question, self.role)), axis=1)
        return np.bincount(pairs[0], minlength=self.question.max(initial=-1) + 1)[self.question] > 1

    def groups(self) -> dict[str, np.ndarray]:
        """Kind of questions → (n,) true for answers to them; last those that several roles answer."""
        kinds = np.array(self.kinds)
        groups = {f"{kind or 'all'} questions": kinds == kind for kind in dict.fromkeys(self.kinds)}
        shared = self.shared()
        if shared.any() and not shared.all():
            groups["questions that several roles answer"] = shared
        return groups


def measure_persona(
    likelihood: Callable[[list[dict]], list[np.ndarray]], samples: list[dict], kinds: Sequence[str] | None = None
) -> PersonaScores:
    """Read the answers of all samples under every role's persona, and under none.

    Of more than MOST_ROLES roles, those with the most samples are read. Under its own persona a sample keeps its own
    system text, under another's it gets the one of `personas_of`.

    Args:
        likelihood: see support/likelihood.py.
        samples: as support.samples.read_samples yields them.
        kinds: of each sample, such as predict.py's `question_kinds`.
    """
    personas = personas_of(samples)
    roles = list(personas)
    items = [(s, kind) for s, kind in zip(samples, kinds or [""] * len(samples)) if s["role"] in personas]
    crossed = []
    for sample, _ in items:
        systems = [sample["system"] if role == sample["role"] else text for role, text in personas.items()]
        crossed += [{**sample, "system": system} for system in [*systems, ""]]
    losses = likelihood(crossed)
    tokens = np.array([len(own) for own in losses]).reshape(len(items), len(roles) + 1)
    nats = np.array([own.sum() for own in losses]).reshape(len(items), len(roles) + 1)
    (kept,) = np.nonzero(
        (tokens[:, 0] > 0) & (tokens == tokens[:, :1]).all(axis=1)
    )  # one that was cut compares nothing
    items = [items[number] for number in kept]
    questions = [tuple(turn["content"] for turn in sample["messages"][:-1]) for sample, _ in items]
    return PersonaScores(
        roles,
        [kind for _, kind in items],
        np.array([roles.index(sample["role"]) for sample, _ in items], dtype=int),
        numbered(questions),
        numbered([first_question(sample["messages"]) for sample, _ in items]),
        tokens[kept, 0],
        nats[kept, :-1],
        nats[kept, -1],
    )


def personas_of(samples: list[dict]) -> dict[str, str]:
    """The MOST_ROLES roles with the most samples, in the order of the samples: role → system text of most of them."""
    most = [role for role, _ in Counter(sample["role"] for sample in samples).most_common(MOST_ROLES)]
    roles = dict.fromkeys(sample["role"] for sample in samples if sample["role"] in most)
    systems = {role: Counter(sample["system"] for sample in samples if sample["role"] == role) for role in roles}
    return {role: own.most_common(1)[0][0] for role, own in systems.items()}


# ---------------------------------------------------------------- tables


def who_said_it(scores: PersonaScores) -> np.ndarray:
    """(n, 2): 100 where the own persona makes an answer likeliest, else 0; its margin over the best other, nats a token."""
    accuracy = 100 * np.take_along_axis(scores.heard(), scores.role[:, None], axis=1)[:, 0]
    margin = (scores.own() - scores.others().max(axis=1)) / scores.tokens
    return np.stack((accuracy, margin), axis=1)


def mean_of_roles(role: np.ndarray, items: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of the roles' means of `items` (n, k), where item i counts counts[i] times: (k,).

    So always naming the same role gives an accuracy of exactly 1 / R, however many answers each role has.
    """
    own = (np.arange(role.max() + 1)[:, None] == role) * counts  # (R, n)
    own = own[own.any(axis=1)]
    return (own @ items / own.sum(axis=1, keepdims=True)).mean(axis=0)


def likelihoods(scores: PersonaScores) -> np.ndarray:
    """(4, n): nats of each answer under its own persona, under another (mean of the others), under none; its tokens."""
    another = scores.others().mean(axis=1) if len(scores.roles) > 1 else np.full(len(scores.role), np.nan)
    return np.stack((scores.own(), another, scores.without, scores.tokens))


def persona_losses(items: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`likelihoods` → loss in nats a token with the own persona, another's, none; what the own one is worth against both."""
    own, another, none, tokens = items @ counts
    losses = -np.array([own, another, none]) / tokens
    return np.array([*losses, *(losses[1:] - losses[0])])


def persona_sections(scores: dict[str, PersonaScores], resamples: int, seed: int) -> list[Section]:
    """Tables of who said it, of who is heard, and of the persona's worth, with 95 % bootstrap intervals.

    Args:
        scores: of each model by its name, on the same samples; the others are compared with the first one.
    """
    first = next(iter(scores.values()))
    if not len(first.role):
        return []
    sections, several = [], len(first.roles) > 1
    for kind, taken in first.groups().items():
        present = {name: own.among(taken) for name, own in scores.items()}
        here = next(iter(present.values()))
        if len(here.roles) < 2:
            continue
        said = {name: who_said_it(own) for name, own in present.items()}
        measure = partial(mean_of_roles, here.role)
        groups = groups_by_role(here, taken)
        rows = compared(said, groups, measure, here.opening, (".1f", "+.3f"), resamples, seed)
        chance = f"{100 / len(here.roles):.1f}"
        rows = [[*row[:4], chance if row[2] else "", row[4]] for row in rows]
        header = ["role", "", "answers", "accuracy", "chance", "margin"]
        sections.append(Section(f"Who said it: {kind}", [header, *rows], WHO_SAID_IT))
    if several:
        sections.append(confusion_section(scores))
    groups = groups_by_role(first, np.ones(len(first.role), dtype=bool))
    forms = (".3f", ".3f", ".3f", "+.3f", "+.3f")
    worth = {name: likelihoods(own) for name, own in scores.items()}
    rows = compared(worth, groups, persona_losses, first.opening, forms, resamples, seed, plain=range(3))
    header = ["role", "", "answers", "own", "another's", "none", "another's − own", "none − own"]
    return [*sections, Section("What the persona is worth", [header, *rows], WORTH)]


def groups_by_role(scores: PersonaScores, taken: np.ndarray) -> dict[str, np.ndarray]:
    """Role → its answers among those taken, and last all of them."""
    groups = {name or "(no role)": taken & (scores.role == number) for number, name in enumerate(scores.roles)}
    groups = {name: own for name, own in groups.items() if own.any()}
    return groups if len(groups) == 1 else {**groups, "all": taken}


def confusion_section(scores: dict[str, PersonaScores]) -> Section:
    first = next(iter(scores.values()))
    rows = [["questions", "", "said by", *(f"heard as {role}" for role in first.roles)]]
    for kind, taken in first.groups().items():
        for name, own in scores.items():
            for role, shares in zip(first.roles, own.confusion(taken)):
                if not np.isnan(shares).any():
                    rows.append([kind.removesuffix(" questions"), name, role, *(f"{100 * s:.1f}" for s in shares)])
    return Section("Who is heard", rows, HEARD)


WHO_SAID_IT = (
    "accuracy: answers, in percent, that are likeliest under the persona of the role they were recorded for, of the roles "
    "in the table; higher is better, and chance is what a model reaches that pays no attention to the persona. margin: "
    "by how many nats a token they are likelier so than under the best other persona; above 0 is better. all: the mean "
    "of the roles. In brackets 95 % intervals."
)
HEARD = (
    "Of a role's recorded answers, in percent, those that are likeliest under the persona of each role; where a role is "
    "heard as itself, higher is better. A column that is high throughout is a persona that the model always prefers."
)
WORTH = (
    "Mean loss of the recorded answers, in nats a token, with the role's own persona, with another's (the mean of the "
    "others) and with none; lower is better. The differences are what the own persona is worth: above 0 is better."
)

# ---------------------------------------------------------------- while training


def who_said_it_now(args, samples: list[dict], model, tokenizer, layout) -> dict[str, float]:
    """Accuracy (in percent) and margin on a fixed slice of train.py's test samples, for TensorBoard; nothing for one role.

    The slice costs about a tenth of the evaluation: n answers of each of R roles are read R + 1 times, so that n is a
    tenth of the samples divided by R · (R + 1), or 2 where that is less; of RoleBench's 1,885 samples 45. Nothing is
    drawn, and the model keeps its mode, so training goes on as if nothing had been measured. For one process alone:
    nothing here waits for another.
    """
    roles = list(personas_of(samples))
    if len(roles) < 2:
        return {}
    per_role = max(2, len(samples) // (10 * len(roles) * (len(roles) + 1)))
    chosen = []
    for role in roles:
        own = [sample for sample in samples if sample["role"] == role]
        chosen += own[:: max(1, len(own) // per_role)][:per_role]
    limits = (args.max_len, args.max_src_len, args.packing, args.max_pack_len)
    training = model.training
    model.eval()
    scores = measure_persona(Likelihood(model, tokenizer, layout, *limits), chosen)
    model.train(training)
    if not len(scores.role):
        return {}
    accuracy, margin = mean_of_roles(scores.role, who_said_it(scores), np.ones(len(scores.role)))
    return {"who_said_it_accuracy": float(accuracy), "who_said_it_margin": float(margin)}
