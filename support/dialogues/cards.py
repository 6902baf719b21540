"""Character cards, as programs for role-play exchange them: JSON, or a PNG image that carries the JSON in base64.

Version 1 has its fields at the top, 2 and 3 have them under "data": github.com/malfoyslastname/character-card-spec-v2,
github.com/kwaroran/character-card-spec-v3.
"""

import base64
import json
import re
from pathlib import Path

from support.dialogues.json_files import filled, plain_line_ends, text_problem
from support.errors import UserError, blaming
from support.files import PNG, kind_of_file

OLD_NAMES = {  # of cards before version 1
    "char_name": "name",
    "char_persona": "description",
    "char_greeting": "first_mes",
    "world_scenario": "scenario",
    "example_dialogue": "mes_example",
}


def read_card(path: str | Path) -> dict | None:
    """The fields of a card that are filled in. None: the file is something else. Raises: UserError."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size > 1 << 24:  # with a book of lore, a card may have some megabytes
        return None
    if kind_of_file(path) == PNG:
        from PIL import Image  # here, since few files are images

        with blaming(f"{path}: is a PNG image, and no character card can be read from it"):
            with Image.open(path) as image:
                text = image.text.get("ccv3") or image.text.get("chara")
            if not text:
                raise UserError(f"{path}: is a PNG image without a character card")
            card = card_fields(json.loads(base64.b64decode(text))) or {}
    else:
        try:
            card = card_fields(json.loads(path.read_text(encoding="utf-8-sig")))
        except (ValueError, RecursionError):  # JSON lines, or no JSON
            return None
    if card is not None and (problem := text_problem(card.get("name"))):
        raise UserError(f"{path}: the name of the character card {problem}")
    return card


def card_fields(value) -> dict | None:
    """The fields of a card, whatever its version; None where `value` is none."""
    fields = value.get("data", value) if isinstance(value, dict) else None
    if not isinstance(fields, dict):
        return None
    fields = {OLD_NAMES.get(name, name): plain_line_ends(text) for name, text in fields.items()}
    of_version_1 = "name" in fields and bool({"first_mes", "mes_example", "personality"} & fields.keys())
    return filled(fields) if of_version_1 or str(value.get("spec")).startswith("chara_card") else None


def card_profile(fields: dict, role: str) -> dict:
    """A card as a role of the file of profiles: its description, and its first words as the greeting."""
    parts = [fields[name] for name in ("description", "personality", "scenario") if name in fields]
    if not all(isinstance(part, str) for part in parts):
        return {"description": parts}  # which is no text, as the reader of profiles will say
    greeting = fields.get("first_mes", "")
    greeting = spoken(greeting, role, "你") if isinstance(greeting, str) else greeting
    return filled({"description": spoken("\n".join(parts), role, "对方"), "greeting": greeting})


def card_conversations(fields: dict) -> list[dict]:
    """Those of a card's example dialogues that go from a question to an answer, as samples without a system text."""
    role, conversations = fields["name"], []
    speaker = rf"^\s*(\{{\{{user\}}\}}|\{{\{{char\}}\}}|{re.escape(role)})\s*[:：]"
    for example in re.split("<START>", str(fields.get("mes_example", "")), flags=re.IGNORECASE):
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
