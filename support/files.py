"""Files and directories that are whole or absent, even if the process that writes them is killed; files of settings."""

import glob
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from support.errors import OneProcessError, UserError, first_line, out_of_memory

CHECKPOINT = r"epoch-\d+-step-(\d+)"  # the name of an adapter, and of a state


@contextmanager
def whole_files(*paths):
    """Open UTF-8 text files for writing, one handle a path; they appear, by rename, only once all are on disk.

    When the body raises, nothing appears and what stood there before stays.

    Raises:
        UserError: something else than a file has one of the names, such as the device /dev/null.
    """
    paths = [Path(path).resolve() for path in paths]  # of a link, what it names is replaced
    if others := [path for path in paths if path.exists() and not path.is_file()]:
        raise UserError(*(f"{path}: is no regular file, and is not replaced: name another path" for path in others))
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    handles = []
    try:
        for path, target in zip(temporary, paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target)
            # A file name that is no UTF-8 reaches Python as half surrogates, which JSON writes with backslashes.
            handles.append(open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n"))
        yield handles
        for handle in handles:
            handle.flush()
            os.fsync(handle.fileno())
            handle.close()
        for source, target in zip(temporary, paths):
            source.replace(target)
            put_on_disk(target.parent)
    finally:
        for handle in handles:
            handle.close()
        for path in temporary:
            path.unlink(missing_ok=True)


@contextmanager
def writing(path):
    """Use around libraries that write: each has its own error for a full disk; here it becomes one that names `path`."""
    from safetensors import SafetensorError  # here, so that --help works outside the environment

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise MemoryError(f"{path} cannot be written: {first_line(error)}") from error
        full = "No space left" in str(error) or free_bytes(Path(path)) < 1 << 20  # torch says only that it failed
        reason = "the disk is full" if full else first_line(error)
        raise OneProcessError(f"{path}: cannot be written: {reason}") from error


def unwritable(directory) -> str | None:
    """Why nothing could be written to a directory that may still have to be made, or None."""
    path = Path(directory).absolute()
    while not os.path.lexists(path):
        path = path.parent
    if not path.is_dir():
        return f"{path} is no directory"
    return None if os.access(path, os.W_OK | os.X_OK) else f"{path} is read-only"


@contextmanager
def whole_directory(path, overwrite: bool = False):
    """Yield an empty directory beside `path`; it takes that name, by rename, once its files are on disk.

    Raises:
        UserError: `path` holds something already and `overwrite` is False, or is where a disk is mounted.
    """
    path = Path(path).resolve()  # of a link, what it names is replaced, on its disk
    if path.is_mount():
        raise UserError(f"{path}: a disk is mounted there, and cannot be replaced: name a directory on it")
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists already; name another directory or remove it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove_leftovers(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        rename_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: Path):
    """Remove what processes that were killed had begun to write for `path`: 15 GB each for a model of 7B."""
    import psutil  # here, so that --help works outside the environment

    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = left.name[len(path.name) + 2 : -len(".tmp")]
        own = process == str(os.getpid())  # in a container, the one that was killed often had this one's number
        if process.isdecimal() and (own or not psutil.pid_exists(int(process))):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def rename_directory(temporary: Path, path: Path):
    """Rename a finished directory once its files are on disk. Whatever had the name before is removed."""
    put_on_disk(*temporary.rglob("*"), temporary)
    old = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    put_on_disk(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path):
    """Remove a directory: first its name, in one step, then its files, so that nobody finds half of it."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    path.rename(hidden)
    shutil.rmtree(hidden)


def set_link(link: Path, name: str):
    """Let `link` name a directory beside it: a link or, on a file system that has none, a file with that name in it."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(name)
    except OSError:  # FAT, some network disks
        temporary.write_text(name, encoding="utf-8")
        put_on_disk(temporary)
    if link.is_dir() and not link.is_symlink():  # made by a copy that followed the link
        remove_directory(link)
    temporary.replace(link)
    put_on_disk(link.parent)


def followed(path: str | Path) -> Path:
    """Resolve output_dir/best, which `set_link` has made; return other paths unchanged."""
    path = Path(path)
    if path.is_symlink():
        return path.parent / os.readlink(path)
    if path.is_file() and re.fullmatch(CHECKPOINT, name := path.read_text(encoding="utf-8", errors="replace")[:100]):
        return path.parent / name
    return path


def free_bytes(path: Path) -> int:
    """Of the disk where `path` is to be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def file_digest(path) -> str:
    """The SHA-256 of a file, to be compared with what other programs print."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts) -> str:
    """Sixteen digits that tell bytes, arrays and texts from others."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else memoryview(part).cast("B"))
    return found.hexdigest()[:16]


def put_on_disk(*paths):
    """Wait until files, and the names in directories, would outlast a power cut."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


# ---------------------------------------------------------------- reading

LFS_POINTER = "is a Git-LFS pointer, not the file itself: fetch it with git lfs pull"
PNG = "is a PNG image, where a text is needed"
KINDS = {  # how a file begins → what it is
    b"version https://git-lfs": LFS_POINTER,
    b"\x89PNG": PNG,
    b"\xff\xd8\xff": "is a JPEG image, where a text is needed",
    b"%PDF": "is a PDF document: save its text as UTF-8",
    b"PAR1": "is a Parquet file: write its rows as JSON lines, with pandas, say",
    b"\x1f\x8b": "is compressed by gzip: unpack it",
    b"BZh": "is compressed by bzip2: unpack it",
    b"\xfd7zXZ": "is compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it",
    b"7z\xbc\xaf": "is a 7z archive: unpack it",
    b"PK\x03\x04": "is a zip archive, as .xlsx and .docx are: save what is in it as text in UTF-8",
    b"\xd0\xcf\x11\xe0": "is an old Office file, such as .xls: save what is in it as text in UTF-8",
    b"\xff\xfe": "is UTF-16: save the file as UTF-8",
    b"\xfe\xff": "is UTF-16: save the file as UTF-8",
}


def kind_of_file(path: str | Path) -> str | None:
    """What is wrong with the kind of a file, by its first bytes (an image, an archive, UTF-16, …); None for one to be read."""
    with open(path, "rb") as file:
        beginning = file.read(32)
    return next((kind for magic, kind in KINDS.items() if beginning.startswith(magic)), None)


def read_object(path: str | Path, name: str | None = None) -> dict:
    """The JSON object in a file of settings, which errors call `name`, or by its path. Raises: UserError."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"), parse_int=machine_integer)
        if isinstance(value, dict):
            return value
        reason = "must be one JSON object: write or fetch it again"
    except OSError as error:
        reason = f"is missing or cannot be read ({error.strerror}): correct the path, or fetch the file"
    except (ValueError, RecursionError) as error:  # not UTF-8, too
        reason = kind_of_file(path) or f"is not JSON ({error}): write or fetch it again"
    raise UserError(f"{name or path}: {reason}")


def machine_integer(digits: str) -> int:
    """An integer of at most 64 bits; on a longer one DeepSpeed fails only in the middle of a step. Raises: ValueError."""
    if abs(number := int(digits)) >= 2**63:
        raise ValueError(f"the number {digits} is too large")
    return number
