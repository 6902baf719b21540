"""Who the roles are: the file of profiles, read and checked."""

import json
from pathlib import Path

from support.dialogues.cards import card_fields, card_profile, read_card
from support.dialogues.json_files import composed, filled, parse_json, read_text, text_problem
from support.errors import UserError
from support.files import PICTURE, kind_of_file

SAMPLE_PROFILES = Path(__file__).parents[2] / "data/sample/profiles-zh_desc.json"
MAX_NAME, MAX_DESCRIPTION = 100, 8000  # characters, for training and for the chat page alike
FIELDS = ["name", "description", "greeting", "questions", "portrait", "names"]
PROFILE = '"…" or {"description": "…", "greeting": "…", "questions": ["…"], "portrait": "…", "names": ["…"]}'


def read_characters(path: str | Path) -> dict[str, dict]:
    """Read who the roles are: {role: {"description", "greeting", "questions", "portrait", "names"}}.

    In the file a profile is its description, or an object with "description" and any of the other fields: the first
    words of the role, questions to begin with, an image beside the file, other names that people call the role.
    Those not given are "", [], "" and []. A role that is its description alone, as in RoleBench's file, goes by the
    other names that the sample's file has for it. A profile may also be a character card; the whole file may be a card,
    or one profile with its "name".

    Raises: UserError with every problem of the file.
    """
    card = read_card(path)
    profiles = {card["name"]: card} if card else parse_json(read_text(path), path)
    if isinstance(profiles, dict) and isinstance(profiles.get("description"), str):  # of one role
        profiles = {str(profiles.get("name") or ""): profiles}
    if not isinstance(profiles, dict) or not profiles:
        raise UserError(f'{path}: holds no role: write {{"role": {PROFILE}}}')
    known = json.loads(SAMPLE_PROFILES.read_text(encoding="utf-8"))
    characters, problems = {}, []
    for key, profile in profiles.items():
        role = composed(key)
        if fields := card or card_fields(profile):
            profile = card_profile(fields, role)
        elif not isinstance(profile, dict):
            profile = {"description": profile, "names": known.get(role, {}).get("names", [])}
        given = {"description": None, **filled(profile)}
        for field, value in {"name": role, **given}.items():
            texts = value if field in ("questions", "names") else [value]
            most = MAX_NAME if field == "name" else MAX_DESCRIPTION
            usable = isinstance(texts, list) and not any(text_problem(text) or len(text) > most for text in texts)
            if field not in FIELDS or not usable or field == "name" and composed(value) != role:
                problems.append(
                    f"{path}: the {field} of {role[:20]!r} cannot be {json.dumps(value, ensure_ascii=False)[:40]}: write "
                    f"{PROFILE}, with at most {MAX_NAME} characters in a role's name and {MAX_DESCRIPTION:,} in a text"
                )
        characters[role] = {"greeting": "", "questions": [], "portrait": "", "names": [], **given}
        if card and kind_of_file(path) == PICTURE:
            characters[role]["portrait"] = Path(path).name  # the image that carries the card
    if problems:
        raise UserError(*problems)
    return characters


def long_profiles(characters: dict[str, dict], tokenizer, context: int) -> list[str]:
    """A line for each profile that leaves less than half of the model's context for what is said."""
    lengths = {role: len(tokenizer.text_to_ids(character["description"])) for role, character in characters.items()}
    line = "the profile of {} takes {:,} of the model's {:,} tokens: shorten it"
    return [line.format(role, length, context) for role, length in lengths.items() if length > context // 2]
