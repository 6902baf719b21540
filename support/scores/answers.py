"""Answers beside the recorded ones: what they say, whose voice it is, whether they end, repeat themselves or recite.

limits = recorded_limits(questions, style, recall)        # style and recall: see voice.py; None without training answers
measured = measure_answers(questions, answers, style, recall, limits)
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import chain, compress, pairwise
from typing import NamedTuple

import numpy as np
from rouge_chinese import Rouge

from support.dialogues.samples import first_question
from support.scores.table import Items, Score
from support.scores.voice import COPY, Nearest, Recall, Style

with warnings.catch_warnings():  # jieba imports pkg_resources, which the setuptools of torch 2.11 calls deprecated
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")
    import jieba
jieba.setLogLevel("CRITICAL")  # it tells how it loads its dictionary, and where it cannot keep it
jieba.dt.cache_file = f"jieba-{os.getuid()}.cache"  # in the directory for temporary files, which others use, too


class MeasuredAnswers(NamedTuple):
    """One model's answers to n questions, measured; for the report also what single answers are shown with."""

    answers: Sequence  # each has a text, and whether it stopped by itself
    scores: dict[str, "Score | Distinct2"]
    heard_as: list[str] | None  # the role that each answer sounds like
    nearest: list[Nearest] | None  # to each answer, of its own role's training answers


def words(text: str) -> list[str]:
    return [word for word in jieba.cut(text) if word.strip()]


def rouge_l(answer: str, reference: str) -> float:
    """F-measure, in [0, 1], of the longest common subsequence of words (Lin 2004); 0 for an answer without words."""
    answer, reference = words(answer), words(reference)
    if not answer or not reference:
        return 0.0
    return Rouge(metrics=["rouge-l"]).get_scores(" ".join(answer), " ".join(reference))[0]["rouge-l"]["f"]


def catchwords(system: str) -> list[str]:
    """The phrases that a persona text quotes as its role's own: 常用口头禅是：“朕”、“本皇”, or 自称“朕”."""
    quotations = re.findall(r"(?:口头禅|自称|常说)是?[：:]?((?:“[^”]+”[、，和]?)+)", system)
    return [phrase for quotation in quotations for phrase in re.findall("“([^”]+)”", quotation)]


def measure_answers(
    questions: Sequence, answers: Sequence, style: Style | None, recall: Recall | None, limits: dict[str, dict]
) -> MeasuredAnswers:
    texts, roles = [answer.text for answer in answers], [question.role for question in questions]
    clusters = [(question.role, first_question(question.messages)) for question in questions]  # of conversations
    items = Items.of([question._asdict() for question in questions], clusters)
    heard_as = style.roles_of(texts) if style else None
    nearest = [recall.nearest(role, text) for role, text in zip(roles, texts)] if recall else None
    shares = {"rouge_l": [], "catchwords": [], "stops": [answer.stopped for answer in answers]}
    for question, text in zip(questions, texts):
        shares["rouge_l"].append(np.mean([rouge_l(text, reference) for reference in question.references]))
        phrases = catchwords(question.system)
        shares["catchwords"].append(any(phrase in text for phrase in phrases) if phrases else np.nan)
    if style:
        shares["style"] = [heard == role for heard, role in zip(heard_as, roles)]
    if recall:
        shares["copied"] = [piece.share for piece in nearest]
        shares["copies"] = [piece.share >= COPY for piece in nearest]
    values = {name: 100 * np.array(column, dtype=float) for name, column in shares.items()}
    if recall:
        for name in values.keys() & {"rouge_l", "style"}:
            values[f"{name}_others"] = np.where(values["copies"], np.nan, values[name])
        # There is nothing to compare the answers of other roles with.
        known = [role in recall.recorded for role in roles]
        for name in values.keys() - {"rouge_l", "catchwords", "stops"}:
            values[name] = np.where(known, values[name], np.nan)
    scores = {name: Score(items, column, beside=limits.get(name, {})) for name, column in values.items()}
    scores["distinct_2"] = Distinct2(items, [list(pairwise(words(text))) for text in texts])
    return MeasuredAnswers(answers, scores, heard_as, nearest)


class Distinct2(NamedTuple):
    """Distinct pairs of neighbouring words among all such pairs (Li et al. 2016, arXiv 1510.03055).

    A pair that occurs k times counts 1/k at each occurrence, so the answers' parts add up to the distinct pairs. That is
    settled before the bootstrap draws: an answer that is drawn twice does not make its pairs less distinct.
    """

    items: Items
    pairs: list[list[tuple[str, str]]]  # of each answer

    def among(self, selected: np.ndarray) -> Score:
        """The score of the selected answers alone, (n,) bool."""
        times = Counter(chain.from_iterable(compress(self.pairs, selected)))
        shares = np.full(len(self.pairs), np.nan)
        for number, pairs in enumerate(self.pairs):
            if pairs and selected[number]:
                shares[number] = 100 * sum(1 / times[pair] for pair in pairs) / len(pairs)
        return Score(self.items, shares, np.array([len(pairs) for pairs in self.pairs]))


def recorded_limits(questions: Sequence, style: Style | None, recall: Recall | None) -> dict[str, dict]:
    """What recorded test answers reach: measure → {name: in percent, of each question (n,)}; nan where nothing can be said.

    ceiling: those to the question that sound like their own role; floor: those of the other roles, to questions of its
    kind, that sound like its role; recorded: those to the question that are copies of training answers.
    """
    limits = {}
    number = np.repeat(range(len(questions)), [len(question.references) for question in questions])  # of each answer
    if style:
        groups = [(question.role, question.kind or question.round) for question in questions]
        heard = np.array(style.roles_of([text for question in questions for text in question.references]))
        roles, kinds = (np.array(column, dtype=object)[number] for column in zip(*groups))
        floor = {}
        for role, kind in set(groups):
            others = heard[(roles != role) & (kinds == kind)]
            floor[role, kind] = 100 * np.mean(others == role) if len(others) else np.nan
        ceiling = 100 * np.bincount(number, heard == roles) / np.bincount(number)
        limits["style"] = {"ceiling": ceiling, "floor": np.array([floor[group] for group in groups])}
    if recall:
        copied = [recall.nearest(q.role, text).share >= COPY for q in questions for text in q.references]
        limits["copies"] = {"recorded": 100 * np.bincount(number, copied) / np.bincount(number)}
    return limits
