"""Draw the table of growth in docs/speed.md as images/growth.svg: python3 tests/tools/draw_growth.py"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE, TARGET = ROOT / "docs/speed.md", ROOT / "images/growth.svg"
WIDTH, HEIGHT, LEFT, TOP, GAP = 220, 200, 60, 56, 76  # of a panel; the margins around the panels
WAYS = {"padded-rounds": "#d1603d", "padded": "#8c7ae6", "tree": "#3fa66b"}
WORDS = ("one sample a round, padded", "whole conversations, padded", "trees")


def text(x, y, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>'


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


def main():
    rows = re.findall(r"^\| (\d+) \| (\d+) " + r"\| ([\d.]+) \| [\d,]+ " * 3, SOURCE.read_text(encoding="utf-8"), re.M)
    panels = []
    for persona in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == persona]
        times = {way: [float(row[column]) for row in own] for column, way in enumerate(WAYS, start=2)}
        panels.append(panel(len(panels), persona, [int(row[1]) for row in own], times))
    legend = ""
    for x, colour, words in zip((LEFT, LEFT + 250, LEFT + 500), WAYS.values(), WORDS):
        legend += f'<path d="M{x} 24 h22" class="line" stroke="{colour}"/>' + text(x + 30, 29, words)
    width, height = LEFT + len(panels) * (WIDTH + GAP), TOP + HEIGHT + 76
    legend += text((width - GAP + LEFT) / 2, height - 10, "rounds of a conversation", "faint middle")
    # Light and dark as in the other picture, which is drawn by hand.
    style = re.search("<style>(.*?)</style>", (ROOT / "images/walk.svg").read_text(encoding="utf-8"), re.S)[1]
    style += ".line { fill: none; stroke-width: 2.5; } .axis { stroke: var(--line); } .end { text-anchor: end; }"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"><style>{style}</style>'
    svg += f'<rect width="{width}" height="{height}" class="ground"/>{legend}{"".join(panels)}</svg>\n'
    TARGET.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
