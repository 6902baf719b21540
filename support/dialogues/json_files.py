"""JSON and text files of users, read with an error that names the line."""

import codecs
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from support.errors import UserError
from support.files import kind_of_file

LAYOUT = "correct it; several objects are one a line, or one array"


def text_problem(value) -> str | None:
    """Why `value` is no usable text, or None."""
    # Half a character is an emoji that another program has cut in two: no tokenizer takes it.
    if not isinstance(value, str) or not value.strip() or re.search("[\ud800-\udfff]", value):
        return r"is missing, blank, no string or half a character (\ud800 to \udfff): write text in quotation marks"
    return None


def filled(record: dict) -> dict:
    """A record without the keys that hold nothing: null, "" and [] count as absent."""
    return {key: value for key, value in record.items() if value not in (None, "", [])}


def plain_line_ends(value):
    r"""Every kind of line end in a JSON value as \n, which browsers send: else a role is asked in other words than trained."""
    if isinstance(value, dict):
        return {key: plain_line_ends(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain_line_ends(part) for part in value]
    return re.sub("\r\n|[\r\v\f\x85\u2028\u2029]", "\n", value) if isinstance(value, str) else value


def composed(name: str) -> str:
    """A role's name with each letter and its accents as one character: as two, it looks the same and is another string."""
    return unicodedata.normalize("NFC", name)


@cache
def tell(line: str):
    """Print a warning once, however often a file is read; of several processes on a host one speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("warning:", line, file=sys.stderr)


def check_kind(path: str | Path):
    """Raise UserError where there is no file, or one that holds no text."""
    if not Path(path).is_file():
        raise UserError(f"{path}: is no file: correct the path, or fetch RoleBench with data_helper.py --download")
    if kind := kind_of_file(path):
        raise UserError(f"{path}: {kind}")


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file, with or without a byte-order mark. Raises: UserError, where it is empty too."""
    check_kind(path)
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8: save the file in that encoding") from None
    if not text.strip():
        raise UserError(f"{path}: is empty: fill it, or delete it and fetch RoleBench with data_helper.py --download")
    return text


def parse_json(data: str | bytes, path: str | Path, line: int = 1):
    """The JSON value that begins at a line of a file, with plain line ends; NaN is None. Raises: UserError with the line."""
    try:
        return plain_line_ends(json.loads(data, parse_constant=lambda _: None))
    except json.JSONDecodeError as error:
        line, reason = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # not UTF-8, too many digits
        reason = error
    raise UserError(f"{path}:{line}: is not a JSON object in UTF-8 ({reason}): {LAYOUT}")


def read_records(path: str | Path, problems: list[str] | None = None, check=None) -> Iterator[tuple[str, dict]]:
    """Yield (where, object) of a file of JSON lines, read as they come, or of a `whole_value`, which has to fit into memory.

    Args:
        problems: takes what is wrong with records, which are then left out.
        check: check(object, where), which may raise UserError, gives what is yielded in place of an object.
    Raises:
        UserError: without `problems`; and at the first line, since a file in another layout is wrong in every line.
    """
    check_kind(path)
    values = whole_value(path)
    with open(path, "rb") as file:
        for number, record in enumerate(file if values is None else values, start=1):
            where = f"{path}:{number}" if values is None else f"{path}: sample {number}"
            try:
                if values is None and not record.strip():
                    continue
                record = parse_json(record.rstrip(), path, number) if values is None else record
                if not isinstance(record, dict):
                    raise UserError(f"{where}: is not a JSON object: {LAYOUT}")
                record = check(record, where) if check else record
            except UserError as error:
                if problems is None or (number == 1 and not isinstance(record, dict)):
                    raise
                problems += error.problems
            else:
                yield where, record


def whole_value(path: str | Path) -> list | None:
    """The records of a file that is one JSON array, or one object over several lines. None: it is one of JSON lines."""
    with open(path, "rb") as file:
        first = next(filter(None, (line.removeprefix(codecs.BOM_UTF8).strip() for line in file)), b"")
    if first.startswith(b"["):
        return parse_json(read_text(path), path)
    with suppress(UserError):  # its lines tell what is wrong
        return [parse_json(read_text(path), path)] if first.startswith(b"{") and not first.endswith(b"}") else None
