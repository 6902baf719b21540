"""Scores of the answers to role-play questions."""

import os
import re
from collections.abc import Sequence

import jieba
import numpy as np
from rouge_chinese import Rouge

COLUMNS = ("ROUGE-L", "distinct-2", "catchwords", "stops")
jieba.setLogLevel("CRITICAL")  # it tells how it loads its dictionary, and where it cannot keep it
jieba.dt.cache_file = f"jieba-{os.getuid()}.cache"  # in the directory for temporary files, which others use, too


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
        rows = []
        for question, answer in zip(questions, answers):
            rouge = np.mean([rouge_l(answer.text, reference) for reference in question.references])
            phrases = catchwords(question.system)
            used = any(phrase in answer.text for phrase in phrases) if phrases else np.nan
            rows.append((rouge, used, answer.stopped))
        self.means = np.array(rows, dtype=float)  # (n, 3); nan where a persona has no catchwords
        known: dict[tuple[str, str], int] = {}
        pairs = [
            [known.setdefault(pair, len(known)) for pair in zip(w, w[1:])] for w in (words(a.text) for a in answers)
        ]
        self.pairs = np.array([pair for own in pairs for pair in own], dtype=int)  # word pairs of all answers, in turn
        self.owner = np.repeat(np.arange(len(pairs)), [len(own) for own in pairs])  # the answer each is from

    def parts(self, taken: np.ndarray) -> np.ndarray:
        """What the four columns are shares of, for the questions taken, (n,) bool: see `share`.

        A pair of words that several of their answers have, or one has several times, is shared out among its places:
        so the parts of distinct-2 add up to the distinct pairs, and no draw of the bootstrap, which takes some
        questions twice, lowers it by that.
        """
        used = taken[self.owner]
        places = np.bincount(self.pairs[used], minlength=self.pairs.max(initial=-1) + 1)
        own = used / places[self.pairs].clip(1)
        distinct = np.bincount(self.owner, weights=own, minlength=len(taken))
        parts = part_and_whole(self.means)
        pairs = np.stack((distinct, np.bincount(self.owner, minlength=len(taken))))
        return np.insert(parts, COLUMNS.index("distinct-2"), pairs, axis=2)


def part_and_whole(items: np.ndarray) -> np.ndarray:
    """Items (n, k) whose means are wanted, nan left out, as `share` takes them: (2, n, k)."""
    return np.stack((np.nan_to_num(items), ~np.isnan(items)))


def share(parts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """k shares in percent: of (2, n, k) the sums of parts over those of wholes, where row i counts counts[i] times."""
    with np.errstate(invalid="ignore"):
        part, whole = counts @ parts
        return 100 * part / whole
