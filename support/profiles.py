"""The file of the profiles: who each role is, and what the page shows of it."""

import json
import re
from pathlib import Path

from support.errors import UserError
from support.json_files import parse_object, read_text, text_problem


def read_characters(path: str | Path) -> dict[str, dict]:
    """Read the profiles with their further fields: {role: {"description", "greeting", "questions", "portrait", "names"}}.

    In the file a profile is its description, or an object with "description" and any of the other fields: the first
    words of the role, questions to begin with, an image beside the file, other names that people call the role.
    Those not given are "", [], "" and []. Raises: UserError with every problem of the file.
    """
    text = read_text(path)
    profiles = parse_object(text, path)
    problems = [] if profiles else [f'{path}:1: holds no role: write {{"role": "profile"}}']
    characters = {}
    for role, profile in profiles.items():
        key = re.search(re.escape(json.dumps(role, ensure_ascii=False)) + r"\s*:", text)
        line = text.count("\n", 0, key.start()) + 1 if key else 1
        given = profile if isinstance(profile, dict) else {"description": profile}
        characters[role] = {"description": None, "greeting": "", "questions": [], "portrait": "", "names": []} | given
        found = {"the role": text_problem(role)}
        for field, value in given.items() if "description" in given else [("description", None)]:
            what = "the profile of" if field == "description" else f"{field} in the profile of"
            found[what] = field_problem(field, value)
        problems += [f"{path}:{line}: {what} {role[:20]!r} {problem}" for what, problem in found.items() if problem]
    if problems:
        raise UserError(*problems)
    return characters


def field_problem(field: str, value) -> str | None:
    if field in ("description", "greeting", "portrait"):
        return text_problem(value)
    if field not in ("questions", "names"):
        return "is no field of it: remove it"
    if not isinstance(value, list):
        return 'is not a list: write ["…", "…"]'
    return next(filter(None, map(text_problem, value)), None)
