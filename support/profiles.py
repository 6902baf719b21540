"""Who the roles are: the file of profiles, read and checked."""

import json
import re
from pathlib import Path

from support.errors import UserError
from support.json_files import parse_object, read_text, text_problem

TEXTS, LISTS = ("description", "greeting", "portrait"), ("names", "questions")  # what the file may say of a role
SAMPLE = Path(__file__).parent.parent / "data/sample/profiles-zh_desc.json"


def read_characters(path: str | Path) -> dict[str, dict]:
    """Read a file of profiles: {role: {"description": str, "names": [str, …]}}, and what else it says of a role.

    A role may be its description alone, as in RoleBench's file; its other names are then those of the sample's file.

    Raises: UserError with every problem of the file.
    """
    text = read_text(path)
    characters = parse_object(text, path)
    known = json.loads(SAMPLE.read_text(encoding="utf-8"))
    problems = [] if characters else [f'{path}:1: holds no role: write {{"role": "profile"}}']
    for role, character in characters.items():
        if not isinstance(character, dict):
            character = {"description": character, "names": known.get(role, {}).get("names", [])}
        characters[role] = {"names": [], **character}
        key = re.search(re.escape(json.dumps(role, ensure_ascii=False)) + r"\s*:", text)
        line = text.count("\n", 0, key.start()) + 1 if key else 1
        problems += [f"{path}:{line}: {problem}" for problem in character_problems(role, characters[role])]
    if problems:
        raise UserError(*problems)
    return characters


def character_problems(role: str, character: dict) -> list[str]:
    """What is wrong with one role of a file of profiles."""
    who, problems = repr(role[:20]), []
    texts = {f"the role {who}": role, f"the profile of {who}": character.get("description")}
    for key, value in character.items():
        if key not in TEXTS + LISTS:
            problems.append(f"{who} has the key {key[:20]!r}: write one of {', '.join(TEXTS + LISTS)}, or remove it")
        elif key in LISTS and not isinstance(value, list):
            problems.append(f'"{key}" of {who} is no list: write ["…", "…"]')
        elif key in LISTS:
            texts |= {f'text {number} of "{key}" of {who}': text for number, text in enumerate(value, start=1)}
        elif key != "description":
            texts[f'"{key}" of {who}'] = value
    return problems + [f"{what} {problem}" for what, text in texts.items() if (problem := text_problem(text))]


def read_profiles(path: str | Path) -> dict[str, str]:
    """Read {role: description} from a file of profiles. Raises: UserError with every problem of the file."""
    return {role: character["description"] for role, character in read_characters(path).items()}
