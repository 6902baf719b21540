"""Who the roles are: the file of profiles, read and checked."""

import json
import re
from pathlib import Path

from support.errors import UserError
from support.json_files import parse_object, read_text, text_problem

SAMPLE = Path(__file__).parent.parent / "data/sample/profiles-zh_desc.json"


def read_characters(path: str | Path) -> dict[str, dict]:
    """Read who the roles are: {role: {"description", "greeting", "questions", "portrait", "names"}}.

    In the file a profile is its description, or an object with "description" and any of the other fields: the first
    words of the role, questions to begin with, an image beside the file, other names that people call the role.
    Those not given are "", [], "" and []. A role that is its description alone, as in RoleBench's file, goes by the
    other names that the sample's file has for it. Raises: UserError with every problem of the file.
    """
    text = read_text(path)
    profiles = parse_object(text, path)
    problems = [] if profiles else [f'{path}:1: holds no role: write {{"role": "profile"}}']
    known = json.loads(SAMPLE.read_text(encoding="utf-8"))
    characters = {}
    for role, profile in profiles.items():
        key = re.search(re.escape(json.dumps(role, ensure_ascii=False)) + r"\s*:", text)
        line = text.count("\n", 0, key.start()) + 1 if key else 1
        given = profile
        if not isinstance(profile, dict):
            given = {"description": profile, "names": known.get(role, {}).get("names", [])}
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
