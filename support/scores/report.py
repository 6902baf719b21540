"""The report of predict.py as one HTML file, to be looked at: pictures, and answers side by side. It loads nothing."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from support.files import whole_files
from support.scores.answers import Answers
from support.scores.persona import Said
from support.scores.table import MEASURES, PERCENT, Estimate, Row, about, difference_text, estimate_text, number, title
from support.scores.voice import COPY

SHOWN = 8  # of the best answers, and of the worst
VERDICTS = {1: "better", -1: "worse", 0: "unclear"}  # classes in report.css
NAMES, AXIS, WIDTH, LANE = 390, 740, 1120, 15  # of the picture, in pixels: where names end, axes end; width; height


def write(path: Path, language: str, text: dict[str, str], parts: Sequence[str]):
    """Put the parts, which are HTML, into a page, and that into a file."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    with whole_files(path) as (file,):
        file.write(PAGE.format(language=language, title=text["report"], style=style, body="\n".join(parts)))


def opening(
    sentences: Sequence[str], remarks: Sequence[str], rows: Sequence[Row], names: Sequence[str], text: dict[str, str]
) -> list[str]:
    """What fits one screen: the sentence and the picture. Under it what the rows mean."""
    legend = f'<span class="dot"></span> {escape(names[0])}'
    legend += "".join(f' <b>→</b> <span class="dot full"></span> {escape(name)}' for name in names[1:2])
    legend += "".join(f", {escape(name)}" for name in names[2:])
    return [
        *(f'<p class="sentence">{escape(sentence)}</p>' for sentence in sentences),
        f'<p class="note">{legend} · {escape(text["axes"])}</p>',
        picture(rows, names, text),
        f"<details><summary>{escape(text['meaning'])}</summary>",
        *(f"<p>{escape(line)}</p>" for line in [*about(rows, text), *remarks]),
        "</details>",
    ]


# ---------------------------------------------------------------- pictures


def picture(rows: Sequence[Row], names: Sequence[str], text: dict[str, str]) -> str:
    """A row a measure, a lane for each model after the first: from the first one's number to its own."""
    height, shapes = 8 + LANE * max(1, len(names) - 1), []
    for n, row in enumerate(rows):
        top, form, x = height * n, MEASURES[row.measure].form, scale(row)
        shapes.append(f'<path class="axis" d="M8 {top + height}H{WIDTH}"/>')
        kind = "more" if text[row.measure].startswith("…") else "name"
        shapes.append(f'<text x="{NAMES - 14}" y="{top + height / 2}" class="{kind}">{escape(title(row, text))}</text>')
        for lane, last in enumerate(row.models[1:] or row.models):
            y, verdict, told = top + 4 + LANE * (lane + 0.5), "unclear", number(last.value, form)
            if row.differences:
                verdict, first = VERDICTS[row.verdicts()[lane]], row.models[0]
                told = f"{number(first.value, form)} → {told}   {difference_text(row, lane, text)}"
                shapes.append(f'<path class="{verdict}" d="M{x(first.value):.1f} {y}H{x(last.value):.1f}"/>')
                shapes.append(mark(first, x, y, "before"))
            shapes.append(mark(last, x, y, verdict))
            told += f"   {names[lane + 1]}" if len(names) > 2 else ""
            shapes.append(f'<text x="{AXIS + 16}" y="{y}" class="{verdict}">{escape(told)}</text>')
    size = f'viewBox="0 0 {WIDTH} {height * len(rows)}" width="{WIDTH}"'
    return (
        f'<div class="wide"><svg {size} role="img" aria-label="{escape(text["report"])}">{"".join(shapes)}</svg></div>'
    )


def scale(row: Row) -> Callable[[float], float]:
    """A number → its place: percent from 0 to 100, all else over what its intervals span; the better end is right."""
    ends = [end for own in row.models for end in (own.low, own.high) if not np.isnan(end)]
    low, high = (0.0, 100.0) if MEASURES[row.measure].form == PERCENT else (min(ends), max(ends))
    margin = 0.05 * (high - low) or 1.0
    if MEASURES[row.measure].better < 0:
        low, high, margin = high, low, -margin
    low, high = low - margin, high + margin
    return lambda value: NAMES + (AXIS - NAMES) * (value - low) / (high - low) if not np.isnan(value) else NAMES


def mark(own: Estimate, x: Callable[[float], float], y: float, kind: str) -> str:
    if np.isnan(own.value):
        return ""
    interval = f'<path d="M{x(own.low):.1f} {y}H{x(own.high):.1f}"/>'
    return f'<g class="{kind}">{interval}<circle cx="{x(own.value):.1f}" cy="{y}" r="5"/></g>'


def roles_part(rows: Sequence[Row], by_role: dict[str, list[Row]], text: dict[str, str]) -> list[str]:
    """The last model's numbers, of the whole and of each role, coloured by the difference to the first model."""
    if len(by_role) < 2:
        return []
    columns = {text["all"]: rows} | {role or text["no role"]: own for role, own in by_role.items()}
    lines = ["<tr><th></th>" + "".join(f"<th>{escape(name)}</th>" for name in columns) + "</tr>"]
    for row in rows:
        cells = [f"<th>{escape(text[row.measure])}</th>"]
        for own in columns.values():
            found = next((one for one in own if one.measure == row.measure), None)
            cells.append(role_cell(found, text) if found else "<td></td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return [f'<h2>{escape(text["by role"])}</h2><div class="wide"><table>{"".join(lines)}</table></div>']


def role_cell(row: Row, text: dict[str, str]) -> str:
    form, last = MEASURES[row.measure].form, row.models[-1]
    told, hint, verdict = number(last.value, form), estimate_text(last, form), "unclear"
    if row.differences:
        verdict, hint = VERDICTS[row.verdicts()[-1]], f"{hint}; {difference_text(row, -1, text)}"
        told += f" <small>{number(row.differences[-1].value, '+' + form.lstrip('+'))}</small>"
    return f'<td class="{verdict}" title="{escape(hint)}">{told}</td>'


def heard_part(heard: dict[str, Said], text: dict[str, str]) -> list[str]:
    """Who is heard as whom, of each model: rows are who speaks, columns who is heard; the darker, the more."""
    tables = []
    for name, said in heard.items():
        roles = [escape(role or text["no role"]) for role in said.roles]
        lines = [f"<tr><th>{escape(text['heard'])}</th>" + "".join(f"<th>{role}</th>" for role in roles) + "</tr>"]
        for role, shares in zip(roles, said.confusion()):
            if not np.isnan(shares).any():
                shares = [f"{100 * share:.0f}" for share in shares]
                cells = [f'<td class="share" style="--share: {share}%">{share}</td>' for share in shares]
                lines.append(f"<tr><th>{role}</th>{''.join(cells)}</tr>")
        if len(roles) > 1 and len(lines) > 1:
            tables.append(f'<div class="wide"><h3>{escape(name)}</h3><table>{"".join(lines)}</table></div>')
    heading = f"<h2>{escape(text['who is heard'])}</h2>"
    return [heading, '<div class="heard">', *tables, "</div>"] if tables else []


# ---------------------------------------------------------------- answers side by side


def answers_part(questions: Sequence, answers: dict[str, list], measured: dict[str, Answers], text: dict[str, str]):
    """All answers: the best and the worst of the last model first, by ROUGE-L. A role's are chosen by its button.

    The browser does that by itself, by `:has()`: no script runs in this page.
    """
    roles = list(dict.fromkeys(question.role for question in questions))
    cards = [
        card(n, roles.index(question.role), question, answers, measured, text) for n, question in enumerate(questions)
    ]
    last = list(answers)[-1]
    order = np.argsort(-measured[last].scores["rouge_l"].value, kind="stable")
    shown = min(SHOWN, len(order) // 2)
    best, rest, worst = order[:shown], np.sort(order[shown : len(order) - shown]), order[::-1][:shown]
    parts = [f"<h2>{escape(text['answers'])}</h2>"]
    if len(roles) > 1:
        hidden = (f"body:has(#role{n}:checked) article:not(.role{n})" for n in range(len(roles)))
        buttons = [("every", text["all"]), *((f"role{n}", role or text["no role"]) for n, role in enumerate(roles))]
        parts.append(f"<style>{', '.join(hidden)} {{ display: none; }}</style><fieldset>")
        for name, label in buttons:
            checked = " checked" if name == "every" else ""
            parts.append(f'<label><input type="radio" name="role" id="{name}"{checked}> {escape(label)}</label>')
        parts.append("</fieldset>")
    for heading, numbers in (("best", best), ("worst", worst)):
        if len(numbers):
            parts += [f"<h3>{escape(text[heading].format(last))}</h3>", *(cards[number] for number in numbers)]
    summary = f"<summary>{escape(text['others'])}: {len(rest)}</summary>"
    return [
        *parts,
        f"<details{'' if shown else ' open'}>{summary}{''.join(cards[number] for number in rest)}</details>",
    ]


def card(
    number: int, role: int, question, answers: dict[str, list], measured: dict[str, Answers], text: dict[str, str]
):
    """One question with the models' answers side by side, and the recorded ones."""
    columns = []
    for name, own in answers.items():
        scores, nearest = measured[name], ""
        facts = [f"ROUGE-L {scores.scores['rouge_l'].value[number]:.0f}"]
        if scores.heard_as:
            facts.append(text["sounds like"].format(scores.heard_as[number] or text["nobody"]))
        if scores.nearest:
            found = scores.nearest[number]
            facts.append(text["share copied"].format(100 * found.share))
            if found.share >= COPY:
                nearest = (
                    f"<details><summary>{escape(text['training answer'])}</summary>{paragraph(found.text)}</details>"
                )
        if not own[number].stopped:
            facts.append(text["cut off"])
        said = paragraph(own[number].text) or f'<p class="note">{escape(text["nothing"])}</p>'
        columns.append(
            f'<div><h4>{escape(name)}</h4>{said}<p class="note">{escape(" · ".join(facts))}</p>{nearest}</div>'
        )
    recorded = "".join(map(paragraph, dict.fromkeys(question.references)))
    columns.append(f"<div><h4>{escape(text['recorded answers'])}</h4>{recorded}</div>")
    who = " · ".join(text.get(label, label) for label in (question.role, question.kind, question.round) if label)
    return (
        f'<article class="role{role}"><p class="note">{escape(who)}</p><p class="question" lang="zh">'
        f'{escape(question.prompt)}</p><div class="answers">{"".join(columns)}</div></article>'
    )


def paragraph(text: str) -> str:
    return f'<p class="said" lang="zh">{escape(text)}</p>' if text.strip() else ""


PAGE = """<!doctype html>
<html lang="{language}">
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
