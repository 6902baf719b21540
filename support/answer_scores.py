"""The answers of several models to the same questions, in tables: what they say, whose voice it is, what is recalled."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from support.intervals import compared, numbered
from support.samples import first_question
from support.scores import COLUMNS, Scores, part_and_whole, share
from support.tables import Section
from support.voice import COPY, Nearest, Recall, Style


class AnswerScores(NamedTuple):
    """One model's answers to n questions, measured. The last two are None without training answers to compare with."""

    scores: Scores
    heard_as: list[str] | None  # the role that each answer sounds like
    nearest: list[Nearest] | None  # to each answer, of its own role's training answers


def measure_answers(questions: Sequence, answers: Sequence, style: Style | None, recall: Recall | None) -> AnswerScores:
    """`questions` have role, system and references, `answers` a text and whether it stopped by itself."""
    texts = [answer.text for answer in answers]
    heard_as = style.roles_of(texts) if style else None
    nearest = [recall.nearest(question.role, text) for question, text in zip(questions, texts)] if recall else None
    return AnswerScores(Scores(questions, answers), heard_as, nearest)


def answer_sections(
    questions: Sequence,
    models: dict[str, AnswerScores],
    style: Style | None,
    recall: Recall | None,
    resamples: int,
    seed: int,
) -> list[Section]:
    """A table for each kind of question and each of the three: scores, style, recall. See the notes under them.

    Args:
        questions: n, with role, kind, messages and references.
        models: each one's answers, by its name; the others are compared with the first one.
    """
    tables = [("", COLUMNS, SCORES, {name: own.scores.parts for name, own in models.items()})]
    # There is nothing to compare the answers of other roles with.
    known = np.array([[recall is None or question.role in recall.recorded] for question in questions])
    if style:
        limits = style_limits(questions, style)
        items = {name: np.column_stack((in_own_style(questions, own), limits)) for name, own in models.items()}
        tables.append((": style", STYLE_COLUMNS, STYLE, parts_of(items, known)))
    if recall:
        expected = recorded_copies(questions, recall)
        items = {name: recall_items(questions, own, expected) for name, own in models.items()}
        columns = RECALL_COLUMNS if style else RECALL_COLUMNS[:5]
        tables.append((": recall or voice", columns, RECALL, parts_of(items, known)))

    # The rounds of a conversation hang together.
    clusters = numbered([(question.role, first_question(question.messages)) for question in questions])
    sections = []
    for kind in dict.fromkeys(question.kind for question in questions):
        for title, columns, text, parts in tables:
            rows = [["role", "", "samples", *columns]]
            for label, taken in groups_of(questions, kind).items():
                own = {name: parts_of_taken(taken) for name, parts_of_taken in parts.items()}
                forms, plain = (".1f",) * len(columns), [n for n, name in enumerate(columns) if name == "floor"]
                rows += compared(own, {label: taken}, share, clusters, forms, resamples, seed, plain)
            rows = [row if row[2] else without_limits(columns, row) for row in rows]
            sections.append(Section(f"{kind.capitalize() or 'All'} questions{title}", rows, note(text, models)))
    return sections


def parts_of(items: dict[str, np.ndarray], known: np.ndarray) -> dict:
    """Of each model a function of the questions taken, as `Scores.parts` is one; here they do not matter."""

    wholes = {name: part_and_whole(np.where(known, own, np.nan)) for name, own in items.items()}
    return {name: lambda taken, parts=parts: parts for name, parts in wholes.items()}


def without_limits(columns: Sequence[str], row: list[str]) -> list[str]:
    """A row of differences; what recorded answers reach is the same beside every model."""
    return [*row[:3], *("" if name in RECORDED else text for name, text in zip(columns, row[3:]))]


def groups_of(questions: Sequence, kind: str) -> dict[str, np.ndarray]:
    """Role → (n,) true for its questions of this kind; last all of them."""
    of_kind = np.array([question.kind == kind for question in questions])
    roles = list(dict.fromkeys(question.role for question in questions if question.kind == kind))
    groups = {role or "(no role)": of_kind & [question.role == role for question in questions] for role in roles}
    return groups if len(roles) == 1 else {**groups, "all": of_kind}


def in_own_style(questions: Sequence, own: AnswerScores) -> np.ndarray:
    """(n,) 1 where an answer sounds like its own role, else 0."""
    return np.array([float(question.role == heard) for question, heard in zip(questions, own.heard_as)])


def style_limits(questions: Sequence, style: Style) -> np.ndarray:
    """(n, 2) of each question: the share of the recorded answers to it that sound like its own role, and of those of the
    other roles to questions of its kind; nan where there are none."""
    texts = [text for question in questions for text in question.references]
    owner = np.repeat(np.arange(len(questions)), [len(question.references) for question in questions])
    heard = np.array(style.roles_of(texts))
    roles, kinds = (np.array([getattr(question, name) for question in questions]) for name in ("role", "kind"))
    ceiling = [np.mean(heard[owner == number] == role) for number, role in enumerate(roles)]
    floor_of = {}
    for role, kind in set(zip(roles, kinds)):
        others = heard[(roles[owner] != role) & (kinds[owner] == kind)]
        floor_of[role, kind] = np.mean(others == role) if len(others) else np.nan
    return np.column_stack((ceiling, [floor_of[place] for place in zip(roles, kinds)]))


def recorded_copies(questions: Sequence, recall: Recall) -> np.ndarray:
    """(n,) the share of the recorded test answers to each question that are copies by the same measure."""
    return np.array(
        [
            np.mean([recall.nearest(question.role, text).share >= COPY for text in question.references])
            for question in questions
        ]
    )


def recall_items(questions: Sequence, own: AnswerScores, expected: np.ndarray) -> np.ndarray:
    """(n, 7), or 5 without styles: the columns of RECALL_COLUMNS in [0, 1]; nan where an answer is not of that kind."""
    copied = np.array([nearest.share for nearest in own.nearest])
    copies = copied >= COPY
    columns = [copied, copies, expected]
    scores = [own.scores.means[:, 0]]  # ROUGE-L
    if own.heard_as:
        scores.append(in_own_style(questions, own))
    for score in scores:
        columns += [np.where(copies, score, np.nan), np.where(copies, np.nan, score)]
    return np.column_stack(columns)


# ---------------------------------------------------------------- what the columns mean


def note(text: str, models: dict) -> str:
    difference = f"Differences are to {next(iter(models))}, on the same questions. " if len(models) > 1 else ""
    return f"{text} All in percent; in brackets 95 % bootstrap intervals over the questions. {difference}".strip()


STYLE_COLUMNS = ["style", "ceiling", "floor"]
RECALL_COLUMNS = [
    "copied",
    "copies",
    "recorded copies",
    "ROUGE-L, copies",
    "ROUGE-L, others",
    "style, copies",
    "style, others",
]
RECORDED = ("ceiling", "floor", "recorded copies")  # what recorded answers reach, whatever a model says

SCORES = (
    "ROUGE-L: how much of a recorded answer comes back, by words in their order; higher is better. distinct-2: distinct pairs "
    "of neighbouring words among all pairs; low when answers repeat themselves or each other. catchwords: answers that use "
    "a phrase which the persona quotes; higher is more in role. stops: answers that end by themselves; higher is better."
)
STYLE = (
    "style: answers that a classifier of character n-grams, trained on the training answers, takes for their own role's; "
    "higher is better. ceiling: the same for the recorded test answers. floor: the same for the other roles' recorded "
    "answers, which is where answers in a wrong voice end up; one number a role, without an interval."
)
RECALL = (
    "copied: the part of an answer that its longest common piece with a training answer of its role has. copies: answers of "
    f"which that is {100 * COPY:.0f} % or more; recorded copies: the same for the recorded test answers. Many more copies than "
    "that are recall, not voice. Then the scores of copies and of the others: where the others score well too, the role has "
    "been learned and not only its lines."
)
