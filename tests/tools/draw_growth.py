"""Draw the table of growth in docs/speed.md as images/growth.svg: python3 tests/tools/draw_growth.py"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
WIDTH, HEIGHT, LEFT, TOP, GAP = 220, 200, 60, 56, 76  # of a panel; the margins around the panels
WAYS = {"one sample a round, padded": "#d1603d", "whole conversations, padded": "#8c7ae6", "trees": "#3fa66b"}


def text(x, y, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>'


def panel(persona: str, rounds: list[int], columns: list[list[float]]) -> str:
    """Milliseconds over rounds, for one length of the persona."""
    top, last = max(map(max, columns)), rounds[-1]
    drawn = f'<path d="M0 0 V{HEIGHT} H{WIDTH}" class="axis" fill="none"/>' + text(0, -14, f"persona {persona} tokens")
    drawn += text(-8, 5, f"{top:,.0f} ms", "faint end") + text(-8, HEIGHT + 5, "0", "faint end")
    for number in rounds:
        drawn += text(number / last * WIDTH, HEIGHT + 20, str(number), "faint middle")
    for colour, values in zip(WAYS.values(), columns):
        points = [f"{x / last * WIDTH:.1f} {(1 - y / top) * HEIGHT:.1f}" for x, y in zip(rounds, values)]
        drawn += f'<path d="M{" L".join(points)}" class="line" stroke="{colour}"/>'
    return drawn


def main():
    table = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\d+) " + r"\| ([\d.]+) \| [\d,]+ " * 3, table, re.MULTILINE)
    legend = panels = ""
    for number, (words, colour) in enumerate(WAYS.items()):
        x = LEFT + 250 * number
        legend += f'<path d="M{x} 24 h22" class="line" stroke="{colour}"/>' + text(x + 30, 29, words)
    for number, persona in enumerate(("50", "200", "800")):
        _, rounds, *columns = zip(*(map(float, row) for row in rows if row[0] == persona))
        drawn = panel(persona, list(map(int, rounds)), columns)
        panels += f'<g transform="translate({LEFT + number * (WIDTH + GAP)} {TOP + 24})">{drawn}</g>'
    width, height = LEFT + 3 * (WIDTH + GAP), TOP + HEIGHT + 76
    legend += text((width - GAP + LEFT) / 2, height - 10, "rounds of a conversation", "faint middle")
    # Light and dark as in the other picture, which is drawn by hand.
    style = re.search("<style>(.*?)</style>", (ROOT / "images/walk.svg").read_text(encoding="utf-8"), re.DOTALL)[1]
    style += ".line { fill: none; stroke-width: 2.5; } .axis { stroke: var(--line); } .end { text-anchor: end; }"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"><style>{style}</style>'
    svg += f'<rect width="{width}" height="{height}" class="ground"/>{legend}{panels}</svg>\n'
    (ROOT / "images/growth.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
