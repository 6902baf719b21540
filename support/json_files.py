"""JSON and text files of users, read with an error that names the line."""

import json
import re
from collections import Counter
from pathlib import Path

from support.errors import UserError

NOT_UTF8 = "is not UTF-8: save the file in that encoding"


def text_problem(value) -> str | None:
    """Why `value` is no usable text, or None."""
    if not isinstance(value, str):
        return "is missing: add it" if value is None else "is not a string: put text between quotation marks"
    if not value.strip():
        return "is blank: fill it in or remove it"
    if re.search("[\ud800-\udfff]", value):
        return r"holds half of a surrogate pair (\ud800 to \udfff), which is no character: remove it"
    return None


def read_text(path: str | Path, may_be_empty: bool = False) -> str:
    """Read a UTF-8 file. Raises: UserError, where it is empty too unless it may be."""
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}: correct the path, or fetch RoleBench with data_helper.py --download"
        ) from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: {NOT_UTF8}") from None
    if not text.strip() and not may_be_empty:
        raise UserError(f"{path}: is empty: fill it, or delete it and fetch RoleBench with data_helper.py --download")
    return text


def parse_object(text: str, path: str | Path, line: int = 1) -> dict:
    """Parse the JSON object that begins at a line of a file. Raises: UserError."""

    def unique(pairs):
        keys = [key for key, _ in pairs]
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            raise ValueError(f"the key {twice[0][:20]!r} occurs twice")
        return dict(pairs)

    if wrong := re.search("[\udc80-\udcff]", text):  # a byte that is not UTF-8, as errors="surrogateescape" reads it
        raise UserError(f"{path}:{line + text.count(chr(10), 0, wrong.start())}: {NOT_UTF8}")
    try:
        if text.startswith("\ufeff"):
            raise ValueError("the file begins with a byte-order mark; save it as UTF-8 without BOM")
        # Numbers are of no use here, and as floats they may have any number of digits.
        value = json.loads(text, parse_int=float, object_pairs_hook=unique)
        if not isinstance(value, dict):
            raise ValueError("it is another JSON value")
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            line, reason = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
        raise UserError(f'{path}:{line}: is not a JSON object {{"…": …}}: {reason}: correct or remove it') from None
    return value


def read_object(path: str | Path, name: str | None = None) -> dict:
    """The JSON object in a file of settings, which errors call `name`, or by its path. Raises: UserError."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"), parse_int=machine_integer)
        if isinstance(value, dict):
            return value
        reason = "must be one JSON object: write or fetch it again"
    except OSError as error:
        reason = f"is missing or cannot be read ({error.strerror}): correct the path, or fetch the file"
    except (ValueError, RecursionError) as error:  # not UTF-8, too
        reason = f"is not JSON ({error}): write or fetch it again"
    raise UserError(f"{name or path}: {reason}")


def machine_integer(digits: str) -> int:
    """An integer of at most 64 bits; on a longer one DeepSpeed fails only in the middle of a step. Raises: ValueError."""
    if abs(number := int(digits)) >= 2**63:
        raise ValueError(f"the number {digits} is too large")
    return number
