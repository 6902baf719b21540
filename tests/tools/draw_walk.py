"""Draw the whole walk, from the data to the page, as images/walk.svg: python3 -m tests.tools.draw_walk

The picture has a background of its own and follows the reader's light or dark scheme.
"""

from pathlib import Path
from xml.sax.saxutils import escape

TARGET = Path(__file__).parent.parent.parent / "images/walk.svg"
WIDTH, HEIGHT = 960, 520
BOX, TALL, TOPS, LEFTS = 216, 190, (24, 306), (24, 372, 720)  # a box: width, height, upper and left edges

STYLE = """
svg { --ground: #ffffff; --box: #f6f8fa; --line: #8c959f; --text: #1f2328; --faint: #59636e;
      --persona: #f2b134; --question: #6ea8d8; --answer: #3fa66b; --frozen: #c9d1d9; --ink: #1f2328; }
@media (prefers-color-scheme: dark) {
  svg { --ground: #0d1117; --box: #161b22; --line: #7d8590; --text: #e6edf3; --faint: #9198a1;
        --persona: #9e6f10; --question: #3f7fb5; --answer: #2f8a53; --frozen: #57606a; --ink: #ffffff; }
}
text { font-family: system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif;
       font-size: 13px; fill: var(--text); }
.title { font-size: 16px; font-weight: 600; } .faint { fill: var(--faint); }
.script { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 12px; }
.ground { fill: var(--ground); } .box { fill: var(--box); stroke: var(--line); }
.persona { fill: var(--persona); } .question { fill: var(--question); } .answer { fill: var(--answer); }
.frozen { fill: var(--frozen); } .ink { fill: var(--ink); } .middle { text-anchor: middle; }
.arrow { stroke: var(--text); stroke-width: 1.5; fill: none; marker-end: url(#head); } .head { fill: var(--text); }
"""


def text(x, y, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(words)}</text>'


def block(x, y, width, height, kind: str, words: str = "") -> str:
    """A coloured rectangle with a word in its middle."""
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" class="{kind}"/>'
    return shape + (text(x + width / 2, y + height / 2 + 4.5, words, "ink middle") if words else "")


def box(column: int, row: int, title: str, note: str, *content: str) -> str:
    """A stage of the walk. `content` is drawn from the box's own upper left corner."""
    frame = f'<rect width="{BOX}" height="{TALL}" rx="8" class="box"/>'
    words = text(14, 27, title, "title") + text(14, TALL - 14, note, "faint")
    return f'<g transform="translate({LEFTS[column]} {TOPS[row]})">{frame}{words}{"".join(content)}</g>'


def arrow(column: int, row: int, *words: str) -> str:
    """From a box to its right neighbour, with the script that leads there, and what it uses, around it."""
    x, y = LEFTS[column] + BOX, TOPS[row] + TALL / 2
    middle, gap = x + (LEFTS[1] - LEFTS[0] - BOX) / 2, LEFTS[1] - LEFTS[0] - BOX
    labels = [text(middle, y + shift, word, "script middle") for shift, word in zip((-10, 20), words)]
    return f'<path d="M{x + 4} {y} H{x + gap - 8}" class="arrow"/>' + "".join(labels)


def picture() -> str:
    data = box(
        *(0, 0, "data  数据", "RoleBench, or your own role"),
        text(14, 62, '{"role": "孙悟空",', "script"),
        text(22, 84, '"question": "你的金箍棒…",', "script"),
        text(22, 106, '"generated": ["俺老孙…"]}', "script"),
        text(14, 142, "profiles 人物简介", "faint"),
    )
    sample = box(
        *(1, 0, "sample  样本", "only the answer carries loss"),
        block(14, 46, 188, 28, "persona", "persona 人设"),
        block(14, 80, 188, 28, "question", "question 问题"),
        block(14, 114, 188, 28, "answer", "answer 回答"),
    )
    lengths = ((54, "persona", "人设"), (20, "question", "问"), (28, "answer", "答"))
    first = [*lengths, (19, "question", "问"), (24, "answer", "答"), (19, "question", "问"), (24, "answer", "答")]
    blocks, x = [], 14
    for width, kind, word in first:
        blocks.append(block(x, 52, width - 1, 28, kind, word))
        x += width
    lines = [
        text(14, 106, "the persona once, then each"),
        text(14, 126, "question with its answer"),
        text(14, 146, "人设只算一次"),
    ]
    row = box(2, 0, "row  行", "same losses and gradients", *blocks, *lines)

    adapters = box(
        *(0, 1, "adapters  适配器", "trained: 0.5 % of the weights"),
        block(14, 42, 80, 80, "frozen", "W"),
        text(101, 87, "+"),
        block(116, 42, 18, 80, "answer", "B"),
        text(140, 87, "·"),
        block(150, 73, 52, 18, "answer", "A"),
        text(14, 144, "frozen 冻结", "faint") + text(116, 144, "trained 训练", "faint"),
    )
    merged = box(
        *(1, 1, "merged  合并", "its logits are compared"),
        block(60, 42, 96, 96, "frozen", "W + α/r · BA"),
        '<rect x="60" y="42" width="96" height="96" rx="3" fill="none" style="stroke: var(--answer)" stroke-width="3"/>',
    )
    page = box(
        *(2, 1, "page  页面", "in a browser, on port 9090"),
        block(62, 48, 140, 30, "question", "你的金箍棒有多重？"),
        block(14, 88, 174, 30, "answer", "俺老孙这根棒子重一万…"),
    )
    x, y = LEFTS[2] + BOX / 2, TOPS[0] + TALL
    half = (y + TOPS[1]) / 2
    back = f'<path d="M{x} {y + 4} V{half} H{LEFTS[0] + BOX / 2} V{TOPS[1] - 8}" class="arrow"/>'
    train = text(WIDTH / 2, half - 9, "train.py", "script middle")
    arrows = [
        arrow(0, 0, "data_helper.py"),
        arrow(1, 0, "utils.py", "Collator"),
        back + train,
        arrow(0, 1, "merge_params.py"),
        arrow(1, 1, "web_demo.py"),
    ]
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head += '<path d="M0 0 L8 4 L0 8 z" class="head"/></marker>'
    title = "From recorded dialogues to a page: data, sample, row, adapters, merged model, page"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">',
            f"<style>{STYLE}</style><defs>{head}</defs>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" class="ground"/>',
            *(data, sample, row, adapters, merged, page),
            *arrows,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    TARGET.write_text(picture(), encoding="utf-8")
    print(TARGET)
