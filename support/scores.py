"""Scores of the answers to role-play questions, and bootstrap intervals of their differences."""

import re
from collections.abc import Callable, Sequence

import jieba
import numpy as np
from rouge_chinese import Rouge

COLUMNS = ("ROUGE-L", "distinct-2", "catchwords", "stops")
jieba.setLogLevel("ERROR")  # it tells how it loads its dictionary


def words(text: str) -> list[str]:
    return [word for word in jieba.cut(text) if word.strip()]


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F-measure in [0, 1]; 0 for an answer without words."""
    answer, reference = words(answer), words(reference)
    if not answer or not reference:
        return 0.0
    return Rouge(metrics=["rouge-l"]).get_scores(" ".join(answer), " ".join(reference))[0]["rouge-l"]["f"]


def catchwords(system: str) -> list[str]:
    """The phrases that a persona text quotes as its role's own: 常用口头禅是：“朕”、“本皇”, or 自称“朕”."""
    quotations = re.findall(r"(?:口头禅|自称|常说)是?[：:]?((?:“[^”]+”[、，和]?)+)", system)
    return [phrase for quotation in quotations for phrase in re.findall("“([^”]+)”", quotation)]


class Scores:
    """The answers of one model to n questions, measured. The columns are those of COLUMNS."""

    def __init__(self, questions: Sequence, answers: Sequence):
        """`questions` have a system text and references, `answers` a text and whether it stopped by itself."""
        phrases = [catchwords(question.system) for question in questions]
        self.means = np.array(  # (n, 3); nan where a persona has no catchwords
            [
                (
                    np.mean([rouge_l(answer.text, reference) for reference in question.references]),
                    any(phrase in answer.text for phrase in own) if own else np.nan,
                    answer.stopped,
                )
                for question, answer, own in zip(questions, answers, phrases)
            ],
            dtype=float,
        )
        known: dict[tuple[str, str], int] = {}
        pairs = [
            [known.setdefault(pair, len(known)) for pair in zip(w, w[1:])] for w in (words(a.text) for a in answers)
        ]
        self.pairs = np.array([pair for own in pairs for pair in own], dtype=int)  # word pairs of all answers, in turn
        self.owner = np.repeat(np.arange(len(pairs)), [len(own) for own in pairs])  # the answer each is from

    def measure(self, counts: np.ndarray) -> np.ndarray:
        """The four columns, in percent, when question i is taken counts[i] times; nan where there is nothing to measure."""
        taken = np.where(np.isnan(self.means), 0, counts[:, None])
        with np.errstate(invalid="ignore"):
            rouge, catch, stops = (taken * np.nan_to_num(self.means)).sum(0) / taken.sum(0)
            present = np.zeros(self.pairs.max(initial=0) + 1, dtype=bool)
            present[self.pairs[counts[self.owner] > 0]] = True
            distinct = present.sum() / counts[self.owner].sum(dtype=float)
        return 100 * np.array([rouge, distinct, catch, stops])


def interval(scores: Scores, baseline: Scores, rows: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """95 % bootstrap intervals of scores − baseline over the questions of `rows`: (2, 4), lower and upper ends.

    Both models answered the same questions, so each resample draws questions, not answers (Efron & Tibshirani 1993).
    A question drawn twice lowers distinct-2 of both models. That shifts the resampled differences away from the measured
    one, so they are shifted back.
    """
    difference = scores.measure(rows) - baseline.measure(rows)
    nothing = np.isnan(difference)  # to measure
    resampled = resample(lambda counts: scores.measure(counts) - baseline.measure(counts), rows, resamples, seed)
    resampled[:, nothing] = 0
    distinct = COLUMNS.index("distinct-2")
    resampled[:, distinct] += difference[distinct] - resampled[:, distinct].mean()
    return np.where(nothing, np.nan, np.nanpercentile(resampled, (2.5, 97.5), axis=0))


def resample(measure: Callable, rows: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """measure(counts) of bootstrap draws: (resamples, k), of which percentiles 2.5 and 97.5 are an interval.

    Args:
        measure: (n,) integers → k numbers, where item i counts counts[i] times.
        rows: (n,), not zero where an item may be drawn.
    """
    generator = np.random.default_rng(seed)
    (drawable,) = np.nonzero(rows)
    draws = (generator.choice(drawable, len(drawable)) for _ in range(resamples))
    return np.array([measure(np.bincount(draw, minlength=len(rows))) for draw in draws])
