"""How the page looks, and what it says in both languages."""

import base64
import html
import json
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import gradio as gr
from PIL import Image

from support.errors import blaming

CSS = Path(__file__).with_name("page.css")
PAIRS = json.loads(Path(__file__).with_name("texts.json").read_text(encoding="utf-8"))  # key → English, Chinese
TEXTS = {language: {key: pair[n] for key, pair in PAIRS.items()} for n, language in enumerate(("en", "zh"))}
I18N = gr.I18n(**TEXTS, **{"zh-CN": TEXTS["zh"], "zh-TW": TEXTS["zh"]})
MARKS = ("−−−", "−−", "−", None, "+", "++", "+++")  # how much likelier fine-tuning made a word
COLOURS = dict(zip(filter(None, MARKS), ("#c8502a", "#e08a5c", "#eeb08a", "#8fc9a3", "#4fae78", "#1f8a52")))
GREENS = "#f1f6f4 #dfebe6 #c1d9d0 #97bfb1 #6a9f8e #4b8472 #2f5d50 #2a5448 #24463d #1f3a33 #12221e"
SANDS = "#f6f4ef #edeae2 #ddd8cc #c9c3b5 #aaa396 #625d53 #4d4940 #3b3831 #262420 #1f1d1a #191816"
THEME = gr.themes.Base(
    primary_hue=gr.themes.Color(*GREENS.split()),
    neutral_hue=gr.themes.Color(*SANDS.split()),
    radius_size="lg",
    font=["system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    background_fill_primary="*neutral_50", block_background_fill="white", input_border_width="1px",
    input_background_fill="*neutral_50", input_background_fill_dark="*neutral_950", button_primary_background_fill="*primary_600",
)  # fmt: skip
ICON = '<link rel="icon" href="favicon.ico">'  # below the path of a proxy, too
SIGN_IN = "<title>Baichuan2</title><main><h1>Baichuan2</h1></main>"  # what gradio's page for it lacks
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
JS = f"() => {{\nconst TEXTS = {json.dumps(TEXTS)};\n{SCRIPT}}}"


def exactly(text: str) -> list[dict]:
    """A message's content, of which nothing is HTML. What is copied or edited is made plain by page.js."""
    return [{"type": "text", "text": text.replace("&", "&amp;").replace("<", "&lt;")}]


def portrait(role: str, image: Path | None = None) -> str:
    """A picture as a data: address; the role's first letter, where it has none. Raises: UserError."""
    if image:
        data = BytesIO()
        with blaming(f"{image}: the portrait of {role} cannot be read as a picture"), Image.open(image) as picture:
            picture.thumbnail((128, 128))
            picture.convert("RGBA").save(data, "PNG")
        return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    hue = sum(ord(letter) for letter in role) * 137 % 360
    return "data:image/svg+xml," + quote(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36"><rect width="36" height="36" fill="hsl({hue} 42% 30%)"/>'
        f'<text x="18" y="24.5" font-size="18" fill="#fff" text-anchor="middle">{html.escape(role[:1])}</text></svg>'
    )


def card(role: str, line: str, picture: str, current: bool = False, head: str = "") -> str:
    """A role in the list; or the head of its conversation, whose class page.css reads: own, or invented by the visitor."""
    here, tag = ' aria-current="true"' if current else "", "h1" if head else "b"
    line = f"<span>{html.escape(line)}</span>" if line else ""
    name = f"<{tag}>{html.escape(role)}</{tag}>"
    return f'<div class="card {head}"{here}><img src="{picture}" alt=""><div>{name}{line}</div></div>'


def mark(difference: float) -> str | None:
    """How a word is coloured whose log-probability fine-tuning has raised by so many nats."""
    level = sum(abs(difference) >= least for least in (0.5, 2, 5))
    return MARKS[3 + level if difference > 0 else 3 - level]
