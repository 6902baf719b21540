"""The report of predict.py as one HTML file, to be looked at: pictures, and answers side by side. report.html is its form.

It loads nothing from elsewhere, and no script runs in it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
import numpy as np

from support.files import whole_files
from support.scores import table
from support.scores.answers import MeasuredAnswers
from support.scores.table import MEASURES, PERCENT, Row
from support.scores.voice import COPY

SHOWN = 8  # of the best answers, and of the worst


def write(path: Path, language: str, questions: Sequence, measured: dict[str, MeasuredAnswers], **shown):
    """Write the report of the models in `measured`, by their names.

    shown: sentences, over the picture; remarks, under it; rows, and by_role, those of each role (see `table.compare`);
    heard, what the models' likelihoods say (`Readings`), by their names.
    """
    rouge_l = list(measured.values())[-1].scores["rouge_l"].value
    order = np.argsort(-rouge_l, kind="stable").tolist()
    count = min(SHOWN, len(order) // 2)
    groups = {"best": order[:count], "worst": order[::-1][:count], "others": sorted(order[count : len(order) - count])}
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    form = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), **options)
    form.globals.update(table=table, scale=scale, copy=COPY, language=language, text=table.texts(language))
    page = form.get_template("report.html").render(questions=questions, measured=measured, groups=groups, **shown)
    with whole_files(path) as (file,):
        file.write(page)


def scale(row: Row, left: float, right: float) -> Callable[[float], float]:
    """A function: number → x. Percent go from 0 to 100, other numbers over what their intervals span; better is right."""
    measure = MEASURES[row.measure]
    ends = [(0, 100)] if measure.form == PERCENT else [(model.low, model.high) for model in row.models]
    worst, best = np.nanmin(ends), np.nanmax(ends)
    if measure.better < 0:
        worst, best = best, worst
    margin = (right - left) / 20

    def x(value: float) -> float:
        return round(float(np.interp(abs(value - worst), (0, abs(best - worst)), (left + margin, right - margin))), 1)

    return x
