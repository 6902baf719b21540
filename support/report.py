"""The report of predict.py as one HTML file: tables, pictures and answers, with nothing loaded from elsewhere."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.answer_scores import AnswerScores
from support.files import whole_files
from support.scores import COLUMNS
from support.tables import Section
from support.voice import COPY

SHOWN = 8  # of the best answers, and of the worst


class Picture(NamedTuple):
    """Who is heard: of the texts of each row's role the share that is taken for each column's."""

    title: str
    roles: list[str]
    shares: np.ndarray  # (R, R) in [0, 1], row by row adding up to 1; nan where a role has no text
    note: str


def write(
    path: Path,
    sections: Sequence[Section],
    remarks: Sequence[str],
    questions: Sequence,
    answers: dict[str, list],
    measured: dict[str, AnswerScores],
    pictures: Sequence[Picture] = (),
):
    """Write the report. `questions` are predict.py's; `answers` and `measured` go by the models' names, in their order.

    The best and the worst answers are the last model's, by ROUGE-L.
    """
    cards = [card(number, questions[number], answers, measured) for number in range(len(questions))]
    last = list(answers)[-1]
    rouge = measured[last].scores.means[:, COLUMNS.index("ROUGE-L")]
    order = np.argsort(-rouge, kind="stable")
    shown = min(SHOWN, len(order) // 2)
    parts = [section_html(section) for section in sections]
    parts += [f"<p>{escape(remark)}</p>" for remark in remarks]
    parts += [picture_html(picture) for picture in pictures]
    if shown:
        for title, numbers in (("best", order[:shown]), ("worst", order[::-1][:shown])):
            heading = f"<h2>The {title} answers of {escape(last)}, by ROUGE-L</h2>"
            parts += [heading, *(cards[number] for number in numbers)]
    parts.append("<h2>All answers</h2>")
    for role in dict.fromkeys(question.role for question in questions):
        own = [cards[number] for number, question in enumerate(questions) if question.role == role]
        summary = f"<summary>{escape(role or '(no role)')}: {len(own)}</summary>"
        parts.append(f"<details>{summary}{''.join(own)}</details>")
    title = "Answers of " + ", ".join(answers)
    with whole_files(path) as (file,):
        file.write(PAGE.format(title=escape(title), style=STYLE, body="\n".join(parts)))


def section_html(section: Section) -> str:
    header, *rows = section.rows
    lines = ["<tr>" + "".join(f"<th>{escape(text)}</th>" for text in header) + "</tr>"]
    before = None
    for row in rows:
        # A role is named once, above a line; the rows under it are its models.
        kind = "" if row[0] == before else ' class="first"'
        first, before = "" if row[0] == before else row[0], row[0]
        lines.append(f"<tr{kind}><th>{escape(first)}</th>" + "".join(map(cell, row[1:])) + "</tr>")
    table = f'<div class="wide"><table>{"".join(lines)}</table></div>'
    return f'<h2>{escape(section.title)}</h2>{table}<p class="note">{escape(section.note)}</p>'


def cell(text: str) -> str:
    value, bracket, interval = text.partition(" [")
    small = f" <small>[{escape(interval)}</small>" if bracket else ""
    return f"<td>{escape(value)}{small}</td>"


def card(number: int, question, answers: dict[str, list], measured: dict[str, AnswerScores]) -> str:
    """One question with the models' answers side by side, and the recorded ones."""
    columns = []
    for name, own in answers.items():
        scores, facts, nearest = measured[name], [], ""
        facts.append(f"ROUGE-L {100 * scores.scores.means[number, COLUMNS.index('ROUGE-L')]:.0f}")
        if scores.heard_as:
            facts.append(f"sounds like {scores.heard_as[number] or 'nobody'}")
        if scores.nearest:
            found = scores.nearest[number]
            facts.append(f"{100 * found.share:.0f} % copied")
            if found.share >= COPY:
                nearest = f"<details><summary>training answer</summary>{paragraph(found.text)}</details>"
        if not own[number].stopped:
            facts.append("cut off")
        columns.append(
            f"<div><h3>{escape(name)}</h3>{paragraph(own[number].text)}"
            f'<p class="facts">{escape(" · ".join(facts))}</p>{nearest}</div>'
        )
    recorded = "".join(map(paragraph, dict.fromkeys(question.references)))
    columns.append(f'<div class="recorded"><h3>recorded</h3>{recorded}</div>')
    who = " · ".join(filter(None, (question.role, question.kind)))
    return (
        f'<article><p class="facts">{escape(who)}</p><p class="question" lang="zh">{escape(question.prompt)}</p>'
        f'<div class="answers">{"".join(columns)}</div></article>'
    )


def paragraph(text: str) -> str:
    return f'<p class="said" lang="zh">{escape(text)}</p>' if text.strip() else '<p class="facts">(nothing)</p>'


def picture_html(picture: Picture) -> str:
    """The matrix as a picture: rows are who speaks, columns who is heard; the darker, the more."""
    size, left, top = 56, 120, 40
    count = len(picture.roles)
    names = [role if len(role) < 8 else role[:7] + "…" for role in picture.roles]
    shapes = []
    for row, name in enumerate(names):
        middle = top + size * row + size / 2
        shapes.append(f'<text x="{left - 10}" y="{middle}" class="row">{escape(name)}</text>')
        column = left + size * row + size / 2
        shapes.append(
            f'<text x="{column}" y="{top - 14}" textLength="{min(size - 6, 14 * len(name))}">{escape(name)}</text>'
        )
        for heard, share in enumerate(picture.shares[row]):
            x, y = left + size * heard, top + size * row
            told = "–" if np.isnan(share) else f"{100 * share:.0f}"
            share = 0.0 if np.isnan(share) else float(share)
            dark = ' class="dark"' if share > 0.75 else ""
            hint = escape(f"{picture.roles[row]} → {picture.roles[heard]}: {told} %")
            shapes.append(
                f'<g><title>{hint}</title><rect x="{x + 1}" y="{y + 1}" width="{size - 2}" height="{size - 2}" rx="3" '
                f'fill-opacity="{0.06 + 0.94 * share:.2f}"/><text x="{x + size / 2}" y="{middle}"{dark}>{told}</text></g>'
            )
    width, height = left + size * count + 4, top + size * count + 4
    label = escape(f"{picture.title}: {', '.join(picture.roles)}")
    drawing = (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{label}">{"".join(shapes)}</svg>'
    )
    return f'<h2>{escape(picture.title)}</h2>{drawing}<p class="note">{escape(picture.note)}</p>'


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d1d1f; --soft: #5f6368; --line: #dcdfe3; --card: #f6f7f9;
  --accent: #2563a8; --cell: #1d5296; --over: #fff; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e8e8ea; --soft: #a0a6ad; --line: #363a40;
  --card: #1f2226; --accent: #6ea8e6;
  --cell: #4f8fd6; --over: #10131a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: .85rem; margin: 0; color: var(--accent); overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; vertical-align: top; }
td small { display: block; white-space: nowrap; line-height: 1.2; } th:first-child { word-break: keep-all; }
td:nth-child(2) { overflow-wrap: anywhere; min-width: 6.5rem; }
@media (max-width: 40rem) { th, td { padding: .2rem .35rem; font-size: .85rem; } td small { font-size: .7rem; } }
th { font-weight: 600; } th:first-child, td:nth-child(2), tr:first-child th:nth-child(2) { text-align: left; }
tr.first > * { border-top: 1px solid var(--line); }
small, .note, .facts { color: var(--soft); font-size: .85rem; } .note { max-width: 60rem; } .facts { margin: .25rem 0; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem 1rem; margin: .75rem 0; }
.question { font-weight: 600; margin: .25rem 0 .5rem; } .question, .said { overflow-wrap: anywhere; white-space: pre-wrap; }
.said { margin: .25rem 0; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: 1rem; }
.recorded h3 { color: var(--soft); }
summary { cursor: pointer; }
svg { max-width: 100%; height: auto; } rect { fill: var(--cell); }
svg text { fill: var(--ink); font-size: 14px; text-anchor: middle; dominant-baseline: central; }
svg text.row { text-anchor: end; } svg text.dark { fill: var(--over); }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
