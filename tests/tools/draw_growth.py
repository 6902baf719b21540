"""Draw the table of growth in docs/speed.md as images/growth.svg: python3 -m tests.tools.draw_growth"""

import re

from tests.tools.draw_walk import STYLE, TARGET, text

SOURCE, TARGET = TARGET.parents[1] / "docs/speed.md", TARGET.with_name("growth.svg")
WIDTH, HEIGHT, LEFT, TOP, GAP = 220, 200, 60, 56, 76  # of a panel; the margins around the panels
WAYS = {"padded-rounds": "#d1603d", "padded": "#8c7ae6", "tree": "#3fa66b"}
STYLE += ".line { fill: none; stroke-width: 2.5; } .axis { stroke: var(--line); } .end { text-anchor: end; }"


def panel(number: int, persona: str, rounds: list[int], milliseconds: dict[str, list[float]]) -> str:
    """Milliseconds over rounds, for one length of the persona."""
    top = max(map(max, milliseconds.values()))
    axes = f'<path d="M0 0 V{HEIGHT} H{WIDTH}" class="axis" fill="none"/>' + text(0, -14, f"persona {persona} tokens")
    axes += text(-8, 5, f"{top:,.0f} ms", "faint end") + text(-8, HEIGHT + 5, "0", "faint end")
    for number_of_rounds in rounds:
        axes += text(number_of_rounds / rounds[-1] * WIDTH, HEIGHT + 20, str(number_of_rounds), "faint middle")
    for way, values in milliseconds.items():
        points = [f"{x / rounds[-1] * WIDTH:.1f} {(1 - y / top) * HEIGHT:.1f}" for x, y in zip(rounds, values)]
        axes += f'<path d="M{" L".join(points)}" class="line" stroke="{WAYS[way]}"/>'
    return f'<g transform="translate({LEFT + number * (WIDTH + GAP)} {TOP + 24})">{axes}</g>'


def picture() -> str:
    rows = re.findall(r"^\| (\d+) \| (\d+) " + r"\| ([\d.]+) \| [\d,]+ " * 3, SOURCE.read_text(encoding="utf-8"), re.M)
    panels = []
    for persona in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == persona]
        times = {way: [float(row[column]) for row in own] for column, way in enumerate(WAYS, start=2)}
        panels.append(panel(len(panels), persona, [int(row[1]) for row in own], times))
    legend, x = "", LEFT
    for way, words in zip(WAYS, ("one sample a round, padded", "whole conversations, padded", "trees")):
        legend += f'<path d="M{x} 24 h22" class="line" stroke="{WAYS[way]}"/>' + text(x + 30, 29, words)
        x += 250
    width, height = LEFT + len(panels) * (WIDTH + GAP), TOP + HEIGHT + 76
    legend += text((width - GAP + LEFT) / 2, height - 10, "rounds of a conversation", "faint middle")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height}" class="ground"/>{legend}{"".join(panels)}</svg>\n'
    )


if __name__ == "__main__":
    TARGET.write_text(picture(), encoding="utf-8")
