"""Scores of models in a table: each with its 95 % bootstrap interval, and the paired differences to the first model."""

from collections.abc import Callable, Sequence

import numpy as np


def compared(
    scores: dict,
    groups: dict[str, np.ndarray],
    measure: Callable,
    clusters: np.ndarray,
    forms: Sequence[str],
    resamples: int,
    seed: int,
    plain: Sequence[int] = (),
) -> list[list[str]]:
    """Rows of a table: of each group one a model (label, model, items, k cells), then one a difference to the first.

    All models were measured on the same items, so each draw of the bootstrap takes the same ones of all of them (Efron &
    Tibshirani 1993). What is drawn are clusters: two answers to one question, or two rounds of one conversation, are
    not two independent items.

    Args:
        scores: of each model by its name, as `measure` takes them.
        groups: label → (n,) true for the items that belong to it.
        measure: (scores, (n,) integers, how often each item counts) → k numbers, nan where nothing can be measured.
        clusters: (n,) the number of each item's cluster.
        forms: k formats of a number, such as "+.2f", for a value; a difference always has its sign.
        plain: columns, by their numbers, that are shown without an interval.
    """
    rows, names = [], list(scores)
    signed = ["+" + form.lstrip("+") for form in forms]
    for label, taken in groups.items():
        values, draws = draw(list(scores.values()), taken, measure, clusters, resamples, seed)
        for number, name in enumerate(names):
            rows.append([label, name, str(taken.sum()), *cells(values[number], draws[:, number], forms, plain)])
        for number, name in enumerate(names[1:], start=1):
            title = "difference" if len(names) == 2 else f"{name} − {names[0]}"
            more = cells(values[number] - values[0], draws[:, number] - draws[:, 0], signed, plain)
            rows.append([label, title, "", *more])
    return rows


def draw(scores: list, taken, measure, clusters, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What `measure` gives for the items taken, and for draws of them: (models, k) and (resamples, models, k)."""
    generator, drawable = np.random.default_rng(seed), np.unique(clusters[taken])

    def measure_all(drawn):
        counts = np.bincount(drawn, minlength=clusters.max(initial=-1) + 1)[clusters] * taken
        return np.array([measure(own, counts) for own in scores])

    draws = (generator.choice(drawable, len(drawable)) for _ in range(resamples))
    return measure_all(drawable), np.array([measure_all(drawn) for drawn in draws])


def cells(values: np.ndarray, draws: np.ndarray, forms: Sequence[str], plain: Sequence[int] = ()) -> list[str]:
    """values (k,) with their draws (resamples, k) → "value [low, high]"; "–" where there is nothing to measure."""
    texts = []
    for column, (value, form) in enumerate(zip(values, forms)):
        text = "–" if np.isnan(value) else f"{value:{form}}"
        if column not in plain and not np.isnan(value):
            low, high = np.nanpercentile(draws[:, column], (2.5, 97.5))
            text += f" [{low:{form}}, {high:{form}}]"
        texts.append(text)
    return texts


def numbered(keys: Sequence) -> np.ndarray:
    """(n,) clusters: the same number for equal keys, from 0 in the order of their first places."""
    numbers: dict = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=int)
