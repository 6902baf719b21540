"""JSON and text files of users, read with an error that names the line."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from support.errors import UserError
from support.files import kind_of_file

NOT_UTF8 = "is not UTF-8: save the file in that encoding"
RECORD_KEYS = {"messages", "conversations", "prompt", "response", "instruction", "output", "question", "generated"}


def text_problem(value) -> str | None:
    """Why `value` is no usable text, or None."""
    if not isinstance(value, str):
        return "is missing: add it" if value is None else "is not a string: put text between quotation marks"
    if not value.strip():
        return "is blank: fill it in or remove it"
    if re.search("[\ud800-\udfff]", value):
        return r"holds half of a surrogate pair (\ud800 to \udfff), which is no character: remove it"
    return None


def filled(record: dict) -> dict:
    """A record without the keys that hold nothing: null, "" and [] count as absent."""
    return {key: value for key, value in record.items() if value not in (None, "", [])}


def unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f"{path}: {error.strerror}: correct the path, or fetch RoleBench with data_helper.py --download")


def plain_line_ends(value):
    r"""Every kind of line end as \n, which browsers send: else a role is asked in other words than it was trained on."""
    if isinstance(value, list):
        return [plain_line_ends(part) for part in value]
    return re.sub("\r\n|[\r\v\f\x85\u2028\u2029]", "\n", value) if isinstance(value, str) else value


def composed(name: str) -> str:
    """A role's name with each letter and its accents as one character: as two, it looks the same and is another string."""
    return unicodedata.normalize("NFC", name)


def read_text(path: str | Path, may_be_empty: bool = False) -> str:
    """Read a UTF-8 file, with or without a byte-order mark. Raises: UserError, where it is empty too unless it may be."""
    try:
        if kind := kind_of_file(path):
            raise UserError(f"{path}: {kind}")
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: {NOT_UTF8}") from None
    if not text.strip() and not may_be_empty:
        raise UserError(f"{path}: is empty: fill it, or delete it and fetch RoleBench with data_helper.py --download")
    return text


def read_records(path: str | Path, problems: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """Yield (where, object) of a file of JSON lines, read as they come, or of one JSON array, which has to fit into memory.

    Args:
        problems: takes what is wrong with records, which are then left out.
    Raises:
        UserError: the file is something else; without `problems`, at the first record that is no object.
    """
    try:
        file = open(path, encoding="utf-8-sig", errors="surrogateescape")  # a wrong byte is found in its line
    except OSError as error:
        raise unreadable(path, error) from None
    with file:
        letter = file.read(1)
        while letter.isspace():
            letter = file.read(1)
        is_array = letter == "["
        file.seek(0)
        if is_array:
            try:
                records = parse_object('{"records": ' + file.read() + "}", path)["records"]
            except UserError:
                refuse_other_shape(path)
                raise
        else:
            filled_lines = (line for line in file if line.strip())
            if not is_record(next(filled_lines, "")):
                refuse_other_shape(path)
            file.seek(0)
            records = file
        for number, record in enumerate(records, start=1):
            where = f"{path}: sample {number}" if is_array else f"{path}:{number}"
            try:
                if not is_array and record.strip():
                    yield where, parse_object(record.rstrip("\n"), path, number)
                elif isinstance(record, dict):
                    yield where, record
                elif is_array:
                    raise UserError(f'{where}: is not a JSON object {{"…": …}}: correct or remove it')
            except UserError as error:
                if problems is None:
                    raise
                problems += error.problems


def is_record(line: str) -> bool:
    """False where a line is no JSON object, or one that holds the records in a list of its own."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(RECORD_KEYS & value.keys() or not any(map(is_table, value.values())))


def is_table(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def refuse_other_shape(path: str | Path):
    """Raise UserError if the file is no text, or holds JSON neither one object a line nor in one array."""
    if kind := kind_of_file(path):
        raise UserError(f"{path}: {kind}")
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace").lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return  # told in the line where it is wrong
    rest = text[end:].lstrip(" \t\r")  # from the end of the first value on
    shape = None
    if isinstance(value, list) and rest.lstrip().startswith("["):
        shape = "has several arrays"
    elif isinstance(value, dict) and "\n" in text[:end]:
        shape = "has an object over several lines"
    elif isinstance(value, dict) and rest.startswith(","):
        shape = "has commas between its objects"
    elif isinstance(value, dict) and rest[:1] in ("", "\n"):
        shape = "has its records within an object"
    if shape:
        raise UserError(f"{path}: {shape}: write one object a line, or one array of objects")


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
        # Numbers are of no use here, and as floats they may have any number of digits. NaN is how pandas marks what is
        # absent; a byte-order mark stands within a file where two were joined.
        value = json.loads(
            text.removeprefix("\ufeff"), parse_int=float, parse_constant=lambda _: None, object_pairs_hook=unique
        )
        if not isinstance(value, dict):
            raise ValueError("it is another JSON value")
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            line, reason = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
        raise UserError(f'{path}:{line}: is not a JSON object {{"…": …}}: {reason}: correct or remove it') from None
    return value
