"""Who the roles are: the file of profiles, read and checked."""

import json
import re
import unicodedata
from pathlib import Path

from support.dialogues.cards import card_fields, card_profile, read_card
from support.dialogues.json_files import composed, filled, parse_object, plain_line_ends, read_text, text_problem
from support.errors import UserError
from support.files import PNG, kind_of_file

SAMPLE_PROFILES = Path(__file__).parents[2] / "data/sample/profiles-zh_desc.json"
MAX_NAME, MAX_DESCRIPTION = 100, 8000  # characters, for training and for the chat page alike


def read_characters(path: str | Path) -> dict[str, dict]:
    """Read who the roles are: {role: {"description", "greeting", "questions", "portrait", "names"}}.

    In the file a profile is its description, or an object with "description" and any of the other fields: the first
    words of the role, questions to begin with, an image beside the file, other names that people call the role.
    Those not given are "", [], "" and []. A role that is its description alone, as in RoleBench's file, goes by the
    other names that the sample's file has for it. A profile may also be a character card, and so may the whole file.

    Raises: UserError with every problem of the file.
    """
    card = read_card(path)
    text = "" if card else read_text(path)
    profiles = {card["name"]: card} if card else parse_object(text, path)
    problems = [] if profiles else [f'{path}:1: holds no role: write {{"role": "profile"}}']
    known = json.loads(SAMPLE_PROFILES.read_text(encoding="utf-8"))
    characters = {}
    for key, profile in profiles.items():
        role = composed(key)
        fields = card
        if fields is None and isinstance(profile, dict):
            fields = card_fields(profile)
        if fields:
            given = card_profile(fields, role)
        elif isinstance(profile, dict):
            given = filled(profile)
        else:
            given = {"description": profile, "names": known.get(role, {}).get("names", [])}
        if "description" not in given:
            given = {"description": None}
        given = {field: plain_line_ends(value) for field, value in given.items()}

        wrong = [("the role", text_problem(role) or length_problem(role, MAX_NAME))]
        if role in characters:
            wrong = [("the role", "occurs twice, in two forms of Unicode: remove one")]
        for field, value in given.items():
            what = "the profile of" if field == "description" else f"{field} in the profile of"
            wrong.append((what, field_problem(field, value)))
        where = f"{path}:{line_of_key(key, text)}"
        problems += [f"{where}: {what} {role[:20]!r} {problem}" for what, problem in wrong if problem]

        portrait = ""
        if card and kind_of_file(path) == PNG:
            portrait = Path(path).name  # the image that carries the card
        characters[role] = {"greeting": "", "questions": [], "portrait": portrait, "names": [], **given}
    if problems:
        raise UserError(*problems)
    return characters


def line_of_key(key: str, text: str) -> int:
    """The line on which a key of a JSON object stands; 1 where it is written in another way."""
    found = re.search(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:", text)
    return text.count("\n", 0, found.start()) + 1 if found else 1


def length_problem(text: str, most: int) -> str | None:
    if len(text) > most:
        return f"has {len(text):,} characters, at most {most:,} are allowed: shorten it"
    if control := next((c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t"), None):
        return f"holds the control character U+{ord(control):04X}: remove it"
    return None


def field_problem(field: str, value) -> str | None:
    if field in ("description", "greeting", "portrait"):
        return text_problem(value) or length_problem(value, MAX_DESCRIPTION)
    if field not in ("questions", "names"):
        return "is no field of it: remove it"
    if not isinstance(value, list):
        return 'is not a list: write ["…", "…"]'
    return next(filter(None, map(text_problem, value)), None)


def long_profiles(characters: dict[str, dict], tokenizer, context: int) -> list[str]:
    """A line for each profile that leaves less than half of the model's context for what is said."""
    lengths = {role: len(tokenizer.text_to_ids(character["description"])) for role, character in characters.items()}
    told = "the profile of {} takes {:,} of the model's {:,} tokens: shorten it"
    return [told.format(role, length, context) for role, length in lengths.items() if length > context // 2]
