"""The report of predict.py as one HTML file, to be looked at: pictures, and answers side by side. report.html is its form.

It loads nothing from elsewhere, and no script runs in it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
import numpy as np

from support.files import whole_files
from support.scores import table
from support.scores.answers import Answers
from support.scores.persona import Said
from support.scores.table import MEASURES, PERCENT, Row
from support.scores.voice import COPY

SHOWN = 8  # of the best answers, and of the worst


def write(
    path: Path,
    language: str,
    sentences: list[str],
    remarks: list[str],
    rows: list[Row],
    by_role: dict[str, list[Row]],
    heard: dict[str, Said],
    questions: Sequence,
    measured: dict[str, Answers],
):
    """Write the report.

    Args:
        sentences, remarks: over the picture, and under it.
        rows, by_role: see `table.compare`, of all items and of each role.
        heard, measured: of each model, by its name.
    """
    text, roles = table.texts(language), list(dict.fromkeys(question.role for question in questions))
    cards = []
    for number, question in enumerate(questions):
        answers = [shown(name, own, number, text) for name, own in measured.items()]
        cards.append({"role": roles.index(question.role), "question": question, "answers": answers})
    names = list(measured)
    order = np.argsort(-measured[names[-1]].scores["rouge_l"].value, kind="stable")
    count = min(SHOWN, len(order) // 2)
    groups = {"best": order[:count], "worst": order[::-1][:count], "others": np.sort(order[count : len(order) - count])}
    form = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = form.get_template("report.html").render(
        {"language": language, "text": text, "names": names, "rows": rows, "by_role": by_role, "roles": roles},
        sentences=sentences,
        remarks=remarks,
        heard={name: said for name, said in heard.items() if len(said.roles) > 1 and len(said.tokens)},
        groups={title: [cards[number] for number in own] for title, own in groups.items()},
        measures=MEASURES,
        scale=scale,
        table=table,
    )
    with whole_files(path) as (file,):
        file.write(page)


def scale(row: Row, left: float, right: float) -> Callable[[float], float]:
    """A function: number → x. Percent go from 0 to 100, other numbers over what their intervals span; better is right."""
    ends = [end for own in row.models for end in (own.low, own.high) if not np.isnan(end)]
    worst, best = (0.0, 100.0) if MEASURES[row.measure].form == PERCENT else (min(ends), max(ends))
    if MEASURES[row.measure].better < 0:
        worst, best = best, worst
    margin = (right - left) / 20

    def x(value: float) -> float:
        return round(float(np.interp(abs(value - worst), (0, abs(best - worst)), (left + margin, right - margin))), 1)

    return x


def shown(name: str, measured: Answers, number: int, text: dict[str, str]) -> dict:
    """A model's answer to a question, what is said of it, and the training answer of which it is a copy."""
    answer, copy_of = measured.answers[number], ""
    facts = [f"ROUGE-L {measured.scores['rouge_l'].value[number]:.0f}"]
    if measured.heard_as:
        facts.append(text["sounds like"].format(measured.heard_as[number] or text["nobody"]))
    if measured.nearest:
        found = measured.nearest[number]
        facts.append(text["share copied"].format(100 * found.share))
        copy_of = found.text if found.share >= COPY else ""
    if not answer.stopped:
        facts.append(text["cut off"])
    return {"name": name, "text": answer.text.strip(), "facts": " · ".join(facts), "copy_of": copy_of}
