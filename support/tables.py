"""Tables for people: in a terminal and in Markdown alike."""

import unicodedata
from typing import NamedTuple


class Section(NamedTuple):
    """One table of a report."""

    title: str
    rows: list[list[str]]  # the first one is the header
    note: str  # what the columns mean and which direction is better, for a reader without the docs

    def __str__(self) -> str:
        return "\n".join([self.title, "", *markdown(self.rows), "", self.note, ""])


def markdown(rows: list[list[str]]) -> list[str]:
    """Rows, the first of which is the header, as an aligned Markdown table."""

    def width(text):  # a Chinese character takes two columns of a terminal
        return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)

    widths = [max(width(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(t + " " * (w - width(t)) for t, w in zip(row, widths)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]
