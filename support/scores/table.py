"""One shape for all measures, and one table."""

import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Measure(NamedTuple):
    """How a measure's numbers are shown, and which direction is better."""

    family: str  # measures that answer the same question of a reader; texts.json has a line for each
    form: str
    better: int  # +1: higher, −1: lower
    of_roles: bool = False  # the mean of the roles' means, so that a role with many answers counts no more
    exponential: bool = False  # of the mean


PERCENT, NATS, PERPLEXITY = ".1f", "+.3f", ",.2f"
MEASURES = {  # in the order in which a reader asks
    "rouge_l": Measure("answer", PERCENT, +1),
    "who_said_it": Measure("who", PERCENT, +1, of_roles=True),
    "who_said_it_shared": Measure("who", PERCENT, +1, of_roles=True),
    "who_said_it_margin": Measure("who", NATS, +1, of_roles=True),
    "worth_another": Measure("persona", NATS, +1),
    "worth_none": Measure("persona", NATS, +1),
    "loss": Measure("persona", ".3f", -1),
    "style": Measure("style", PERCENT, +1),
    "catchwords": Measure("style", PERCENT, +1),
    "breaks_said": Measure("in_role", PERCENT, -1),
    "breaks_likely": Measure("in_role", PERCENT, -1),
    "attack_margin": Measure("in_role", "+.2f", +1),
    "does_not_know": Measure("boundary", PERCENT, +1),
    "boundary_margin": Measure("boundary", "+.2f", +1),
    "stops": Measure("ends", PERCENT, +1),
    "distinct_2": Measure("variety", PERCENT, +1),
    "copies": Measure("copies", PERCENT, -1),
    "copied": Measure("copies", PERCENT, -1),
    "rouge_l_others": Measure("copies", PERCENT, +1),
    "style_others": Measure("copies", PERCENT, +1),
    "perplexity": Measure("forgotten", PERPLEXITY, -1, exponential=True),
}
LEAST_CLUSTERS = 5  # from so many on a difference may be called sure


class Items(NamedTuple):
    """The role, kind, round and cluster of n items; None where an item has none."""

    role: Sequence[str | None]
    kind: Sequence[str | None]
    round: Sequence[str | None]
    cluster: np.ndarray  # (n,) the same number for items that are drawn together, such as the rounds of a conversation

    @classmethod
    def of(cls, records: Sequence[dict], clusters: Sequence) -> "Items":
        """Of records that may have "role", "kind" and "round"; those whose clusters are equal are drawn together."""
        columns = ([record.get(name) for record in records] for name in ("role", "kind", "round"))
        return cls(*columns, numbered(clusters))


class Score(NamedTuple):
    """What one measure says of one model: of n items a number each, whose weighted mean is the score."""

    items: Items
    value: np.ndarray  # (n,) nan where there is nothing to measure
    weight: np.ndarray | float = 1.0  # (n,)
    beside: dict[str, np.ndarray] = {}  # name → (n,): what the score is to be seen beside, such as chance

    def among(self, selected: np.ndarray) -> "Score":
        """This score, which does not depend on the items selected, (n,) bool; `Distinct2` and `WhoSaidIt` do."""
        return self


class Estimate(NamedTuple):
    value: float
    low: float  # of the 95 % interval
    high: float


class Row(NamedTuple):
    measure: str
    count: int  # of the items that are looked at
    clusters: int  # of those in which every model has a number
    beside: dict[str, float]
    models: list[Estimate]
    differences: list[Estimate]  # of the second model and of those after it, to the first

    def verdicts(self) -> list[int]:
        """Of each difference: +1 better, −1 worse, 0 where its interval holds 0, or where too few clusters make none."""
        if self.clusters < LEAST_CLUSTERS:
            return [0] * len(self.differences)
        better = MEASURES[self.measure].better
        return [better * (int(difference.low > 0) - int(difference.high < 0)) for difference in self.differences]


def numbered(keys: Sequence) -> np.ndarray:
    """(n,) the same number for equal keys, counted from 0 in the order in which they first occur."""
    numbers: dict = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=int)


# ---------------------------------------------------------------- means, intervals, differences


def compare(models: dict[str, dict[str, Score]], resamples: int, seed: int, by: str = "", label: str = "") -> list[Row]:
    """A row for each measure that has something to say.

    The bootstrap draws the same clusters for all models, so their differences are paired (Efron & Tibshirani 1993).

    Args:
        models: {"baseline": {"rouge_l": Score, …}, "model": {"rouge_l": …}}, all on the same items.
        by, label: look at the items of one role, kind or round alone.
    """
    rows, scores_of_first = [], next(iter(models.values()))
    for name in [name for name in MEASURES if name in scores_of_first]:
        measure, items = MEASURES[name], scores_of_first[name].items
        everything = np.full(len(items.cluster), True)
        selected = np.array([value == label for value in getattr(items, by)], dtype=bool) if by else everything
        if not selected.any():
            continue
        # A role is told from the others, so it is measured among all of them.
        context = everything if by == "role" and measure.of_roles else selected
        scores = [scores_of_model[name].among(context) for scores_of_model in models.values()]
        counts = chain([selected], resampled(items.cluster, selected, resamples, seed))
        numbers = means(measure, scores, items.role, counts)
        if np.isnan(numbers[0]).all():
            continue
        known = selected & ~np.isnan([score.value for score in scores]).any(axis=0)
        beside = {}
        for what, values in scores[0].beside.items():
            if not np.isnan(values[known]).all():
                beside[what] = float(np.nanmean(values[known]))
        absolute = [estimate(column) for column in numbers.T]
        differences = [estimate(column - numbers[:, 0]) for column in numbers.T[1:]]
        clusters = len(np.unique(items.cluster[known]))
        rows.append(Row(name, int(selected.sum()), clusters, beside, absolute, differences))
    return rows


def means(measure: Measure, scores: list[Score], roles: Sequence, counts: Iterable[np.ndarray]) -> np.ndarray:
    """Σ weight · value / Σ weight, where item i counts counts[j][i] times: (counts, models); nan is nothing."""
    strata = numbered(roles) if measure.of_roles else np.zeros(len(roles), dtype=int)
    one_hot = strata[:, None] == np.arange(strata.max() + 1)  # (n, strata)
    sums = []
    for score in scores:
        weight = np.where(np.isnan(score.value), 0.0, score.weight)
        sums.append([(weight * np.nan_to_num(score.value))[:, None] * one_hot, weight[:, None] * one_hot])
    sums = np.array(sums)  # (models, 2, n, strata)
    part, whole = np.moveaxis([count @ sums for count in counts], 2, 0)  # (counts, models, strata) each
    known = whole > 0
    with np.errstate(invalid="ignore"):
        numbers = np.divide(part, whole, out=np.zeros_like(part), where=known).sum(axis=-1) / known.sum(axis=-1)
    return np.exp(numbers) if measure.exponential else numbers


def resampled(cluster: np.ndarray, selected: np.ndarray, resamples: int, seed: int):
    """Yield (n,) how often each item counts, with clusters drawn from those of the items selected, with replacement."""
    generator, drawable = np.random.default_rng(seed), np.unique(cluster[selected])
    for _ in range(resamples):
        drawn = generator.choice(drawable, len(drawable))
        yield np.bincount(drawn, minlength=cluster.max() + 1)[cluster] * selected


def estimate(numbers: np.ndarray) -> Estimate:
    """numbers: first what was measured, then what the bootstrap drew."""
    drawn = numbers[1:][~np.isnan(numbers[1:])]
    if np.isnan(numbers[0]) or not len(drawn):
        return Estimate(numbers[0], np.nan, np.nan)
    return Estimate(numbers[0], *np.percentile(drawn, (2.5, 97.5)))


def labels(scores: dict[str, Score], by: str) -> list[str]:
    """The roles, kinds or rounds of all items, in the order of the measures."""
    in_order = chain.from_iterable(getattr(scores[name].items, by) for name in MEASURES if name in scores)
    return [label for label in dict.fromkeys(in_order) if label is not None]


# ---------------------------------------------------------------- as text


def texts(language: str) -> dict[str, str]:
    """All that is shown, in English ("en") or Chinese ("zh")."""
    pairs = json.loads(Path(__file__).with_name("texts.json").read_text(encoding="utf-8"))
    return {name: pair[language == "zh"] for name, pair in pairs.items()}


def system_language() -> str:
    spoken = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if spoken.startswith("zh") else "en"


def number(value: float, form: str) -> str:
    if "," in form and abs(value) >= 100:
        form = form.replace(".2f", ".0f")
    return "–" if np.isnan(value) else f"{value:{form}}"


def estimate_text(estimate: Estimate, form: str) -> str:
    value, low, high = (number(part, form) for part in estimate)
    return f"{value} [{low}, {high}]" if value != "–" else value


def difference_text(row: Row, n: int, text: dict[str, str]) -> str:
    """The difference of a row's n-th model after the first, and "better" or "worse" where that is sure."""
    mark = {1: f" {text['better']}", -1: f" {text['worse']}", 0: ""}[row.verdicts()[n]]
    return estimate_text(row.differences[n], "+" + MEASURES[row.measure].form.lstrip("+")) + mark


def label_text(by: str, label: str, text: dict[str, str]) -> str:
    return label or text["no role"] if by == "role" else text.get(f"label {label}", label)


def title(row: Row, text: dict[str, str]) -> str:
    """A row's name, with what its numbers are to be seen beside: "style, % (ceiling 97.2, floor 1.3)"."""
    beside = text["comma"].join(f"{text[what]} {value:.1f}" for what, value in row.beside.items())
    return text[row.measure] + (text["beside"].format(beside) if beside else "")


def table(rows: list[Row], names: list[str], text: dict[str, str]) -> list[str]:
    """The lines of the table; names: of the models."""
    first, *others = names
    headers = [text["difference"]] if len(others) == 1 else [f"{name} − {first}" for name in others]
    lines = [["", "", *names, *headers]]
    for row in rows:
        measure = MEASURES[row.measure]
        cells = [estimate_text(model, measure.form) for model in row.models]
        cells += [difference_text(row, n, text) for n in range(len(others))]
        lines.append([title(row, text), "↑" if measure.better > 0 else "↓", *cells])
    return markdown(lines)


def about(rows: list[Row], text: dict[str, str]) -> list[str]:
    """A line for each question of a reader that the rows answer."""
    return [text[f"about {family}"] for family in dict.fromkeys(MEASURES[row.measure].family for row in rows)]


def in_a_sentence(rows: list[Row], names: list[str], text: dict[str, str]) -> list[str]:
    """What is better and worse than in the first model, of each of the others.

    The rows of a family have one verdict where those that are sure agree; else it is that of the first of them.
    """
    families = {family: list(group) for family, group in groupby(rows, lambda row: MEASURES[row.measure].family)}
    sentences = []
    for n, name in enumerate(names[1:]):
        titles: dict[int, list[str]] = {1: [], -1: [], 0: []}  # of the families that have this verdict
        for family, group in families.items():
            verdicts = [row.verdicts()[n] for row in group]
            sure = {*verdicts} - {0}
            verdict = sure.pop() if len(sure) == 1 else verdicts[0]
            titles[verdict].append(text[f"name {family}"])
        parts = [text[f"verdict {sign}"].format(text["comma"].join(titles[sign])) for sign in titles if titles[sign]]
        sentences.append(text["sentence"].format(name, names[0], text["semicolon"].join(parts)))
    return sentences or [text["no baseline"]]


def markdown(rows: list[list[str]]) -> list[str]:
    """Rows, the first of which is the header, as an aligned Markdown table."""

    def width(text):  # a Chinese character takes two columns of a terminal
        return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)

    widths = [max(width(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(t + " " * (w - width(t)) for t, w in zip(row, widths)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]
