"""Character cards, as programs for role-play exchange them: JSON, or a PNG image that carries the JSON in base64.

Version 1 has its fields at the top, 2 and 3 have them under "data": github.com/malfoyslastname/character-card-spec-v2,
github.com/kwaroran/character-card-spec-v3.
"""

import base64
import json
import re
from pathlib import Path

from support.dialogues.json_files import plain_line_ends, text_problem
from support.errors import blaming
from support.files import PNG, kind_of_file


def read_card(path: str | Path) -> dict[str, str] | None:
    """The fields of a card that hold text. None: the file is something else. Raises: UserError."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size > 1 << 24:  # with a book of lore, a card may have some megabytes
        return None
    data = path.read_bytes()
    try:
        if kind_of_file(path) == PNG:
            from PIL import Image  # here, since few files are images

            with blaming(f"{path}: is a damaged PNG image"), Image.open(path) as image:
                data = base64.b64decode(image.text.get("ccv3") or image.text.get("chara") or "")
        return card_fields(json.loads(data))
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
    """A card as a role of the file of profiles: its description, and its first words as the greeting."""
    description = "\n".join(fields[name] for name in ("description", "personality", "scenario") if name in fields)
    greeting = spoken(fields.get("first_mes", ""), role, "你")
    return {"description": spoken(description, role, "对方"), "greeting": greeting}


def card_conversations(fields: dict) -> list[dict]:
    """Those of a card's example dialogues that go from a question to an answer, as samples without a system text."""
    role, conversations = fields["name"], []
    speaker = rf"^\s*(\{{\{{user\}}\}}|\{{\{{char\}}\}}|{re.escape(role)})\s*[:：]"
    for example in re.split("<START>", fields.get("mes_example", ""), flags=re.IGNORECASE):
        _, *parts = re.split(speaker, example, flags=re.IGNORECASE | re.MULTILINE)  # speaker, text, speaker, text, …
        texts = [spoken(text, role, "你").strip() for text in parts[1::2]]
        speakers = ["user" if name.lower() == "{{user}}" else "assistant" for name in parts[::2]]
        while speakers[-1:] == ["user"]:
            speakers.pop()
        if "user" in speakers and all(texts[: len(speakers)]):
            turns = [{"role": speaker, "content": text} for speaker, text in zip(speakers, texts)]
            conversations.append({"role": role, "messages": turns})
    return conversations


def spoken(text: str, role: str, user: str) -> str:
    """A card's text with its placeholders filled in."""
    text = re.sub(r"\{\{char\}\}|<BOT>", lambda _: role, text, flags=re.IGNORECASE)
    return re.sub(r"\{\{user\}\}|<USER>", lambda _: user, text, flags=re.IGNORECASE)
