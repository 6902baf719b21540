"""Character cards, as programs for role-play exchange them: JSON, or a PNG image that carries the JSON in base64.

Version 1 has its fields at the top, 2 and 3 have them under "data": github.com/malfoyslastname/character-card-spec-v2,
github.com/kwaroran/character-card-spec-v3.
"""

import base64
import json
import re
from pathlib import Path

from support.dialogues.json_files import plain_line_ends, tell, text_problem
from support.errors import blaming
from support.files import PICTURE, kind_of_file

CHAR, USER = r"(?:\{\{char\}\}|<BOT>|<CHAR>)", r"(?:\{\{user\}\}|<USER>)"  # placeholders, in letters of any case


def read_card(path: str | Path) -> dict[str, str] | None:
    """The fields of a card that hold text. None: the file is something else. Raises: UserError."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size > 1 << 24:  # with a book of lore, a card may have some megabytes
        return None
    if kind_of_file(path) == PICTURE:
        from PIL import Image, PngImagePlugin  # here, since few files are images

        PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # so may its text, once unpacked
        with blaming(f"{path}: is a damaged picture, or carries a damaged card"), Image.open(path) as image:
            texts = getattr(image, "text", {})  # of PNG
            text = texts.get("ccv3") or texts.get("chara")
            return card_fields(json.loads(base64.b64decode(text))) if text else None
    try:
        return card_fields(json.loads(path.read_bytes()))
    except (ValueError, RecursionError):  # JSON lines, or no JSON
        return None


def card_fields(value) -> dict[str, str] | None:
    """The fields of a card that hold text, whatever its version; None where `value` is none."""
    fields = value.get("data", value) if isinstance(value, dict) else None
    if not isinstance(fields, dict) or text_problem(fields.get("name")):
        return None
    of_version_1 = {"first_mes", "mes_example", "personality"} & fields.keys()
    if not of_version_1 and not str(value.get("spec")).startswith("chara_card"):
        return None
    return {name: plain_line_ends(text) for name, text in fields.items() if isinstance(text, str) and text}


def card_profile(fields: dict, role: str) -> dict:
    """A card as a role of the file of profiles: its description, its first words as the greeting, its nickname."""
    description = "\n".join(fields[name] for name in ("description", "personality", "scenario") if name in fields)
    name, names = fields.get("nickname", role), [fields["nickname"]] if "nickname" in fields else []
    greeting = spoken(fields.get("first_mes", ""), name, "你")
    return {"description": spoken(description, name, "对方"), "greeting": greeting, "names": names}


def card_conversations(fields: dict) -> list[dict]:
    """Those of a card's example dialogues that go from a question to an answer, as samples without a system text."""
    role, conversations = fields["name"], []
    name = fields.get("nickname", role)
    speaker = rf"^\s*(?:({USER}|You)|{CHAR}|{re.escape(role)}|{re.escape(name)})\s*[:：]"
    examples = [text for text in re.split("(?i)<START>", fields.get("mes_example", "")) if text.strip()]
    for example in examples:
        _, *parts = re.split(speaker, example, flags=re.IGNORECASE | re.MULTILINE)  # user or None, text, …
        texts = [spoken(text, name, "你").strip() for text in parts[1::2]]
        speakers = ["user" if user else "assistant" for user in parts[::2]]
        while speakers[-1:] == ["user"]:
            speakers.pop()
        if "user" in speakers and all(texts[: len(speakers)]):
            turns = [{"role": speaker, "content": text} for speaker, text in zip(speakers, texts)]
            conversations.append({"role": role, "messages": turns})
    if left_out := len(examples) - len(conversations):
        tell(f"the card of {role}: {left_out} of {len(examples)} examples left out: they lack a question or its answer")
    return conversations


def spoken(text: str, name: str, user: str) -> str:
    """A card's text with its placeholders filled in. Which others stay is told."""
    text = re.sub(f"(?i){CHAR}", lambda _: name, text)
    text = re.sub(f"(?i){USER}", lambda _: user, text)
    for macro in re.findall(r"\{\{.*?\}\}", text):
        tell(f"the card of {name}: {macro} stays as it is: rewrite it, where the role should not say it")
    return text
