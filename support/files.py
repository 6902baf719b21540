"""Files and directories that are whole or absent, even if the process that writes them is killed; files of settings."""

import hashlib
import json
import os
import shutil
from contextlib import ExitStack, contextmanager, suppress
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
    temporary = [path.with_name(f".{path.name}.tmp") for path in paths]
    try:
        with ExitStack() as stack:
            handles = []
            for path in temporary:
                path.parent.mkdir(parents=True, exist_ok=True)
                handles.append(stack.enter_context(open(path, "w", encoding="utf-8", newline="\n")))
            yield handles
        put_on_disk(*temporary)
        for source, target in zip(temporary, paths):
            source.replace(target)
            put_on_disk(target.parent)
    finally:
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
            raise
        full = "No space left" in str(error) or free_bytes(path) < 1 << 20  # torch says only that it failed
        reason = "the disk is full" if full else first_line(error)
        raise OneProcessError(f"{path}: cannot be written: {reason}") from error


@contextmanager
def whole_directory(path, overwrite: bool | None = None):
    """Yield an empty directory beside `path`; it takes that name, by rename, once its files are on disk.

    What a process that was killed has left there goes. `overwrite` is None where no flag could allow it.
    Raises: UserError where `path` holds something and is not to be overwritten.
    """
    path = Path(path).resolve()  # of a link, what it names is replaced, on its disk
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        flag = ", or add --overwrite" if overwrite is False else ""
        raise UserError(f"{path}: exists already: name another directory, remove it{flag}")
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        rename_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def rename_directory(temporary: Path, path: Path):
    """Rename a finished directory once its files are on disk. Whatever had the name before is removed."""
    # The umask decides who may read them, as it did for the directory. safetensors would let nobody else.
    inside = [*temporary.rglob("*")]
    for file in filter(Path.is_file, inside):
        with suppress(OSError):  # some disks have no modes
            file.chmod(temporary.stat().st_mode & 0o666)
    put_on_disk(*inside, temporary)
    if path.exists():
        remove_directory(path)
    temporary.rename(path)
    put_on_disk(path.parent)


def remove_directory(path: Path):
    """Remove a directory: first its name, in one step, then its files, so that nobody finds half of it."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def set_link(link: Path, name: str):
    """Let `link` name a directory beside it. Where a file system has no links, there is none."""
    temporary = link.with_name(f".{link.name}.tmp")
    with suppress(OSError):
        if link.is_dir() and not link.is_symlink():  # made by a copy that followed the link
            remove_directory(link)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(name)
        temporary.replace(link)


def followed(path: str | Path) -> Path:
    """Resolve output_dir/best, which `set_link` has made; return other paths unchanged."""
    path = Path(path)
    return path.parent / path.readlink() if path.is_symlink() else path


def unwritable(directory) -> str | None:
    """Why nothing could be written to a directory that may still have to be made, or None."""
    path = existing(directory)
    if not path.is_dir():
        return f"{path} is no directory"
    return None if os.access(path, os.W_OK | os.X_OK) else f"{path} is read-only"


def free_bytes(path) -> int:
    """Of the disk where `path` is to be."""
    return shutil.disk_usage(existing(path)).free


def existing(path) -> Path:
    """The path, or the nearest one above it that exists."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return path


def file_digest(path) -> str:
    """The SHA-256 of a file, to be compared with what other programs print."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts) -> str:
    """Sixteen digits that tell bytes, arrays and texts from others."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else memoryview(part).cast("B"))
    return digest.hexdigest()[:16]


def put_on_disk(*paths):
    """Wait until files, and the names in directories, would outlast a power cut."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


# ---------------------------------------------------------------- reading

LFS_POINTER = "is a Git-LFS pointer, not the file itself: fetch it with git lfs pull"
PICTURE = "is a picture without a character card: export the card anew, as PNG or JSON, or name a file of text"
KINDS = {  # how a file begins → what it is
    b"version https://git-lfs": LFS_POINTER,
    **dict.fromkeys((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8"), PICTURE),  # RIFF: WebP
    b"PAR1": "is a Parquet file: write its rows as JSON lines, with pandas, say",
    b"\x1f\x8b": "is compressed by gzip: unpack it",
    b"PK\x03\x04": "is a zip archive, as .xlsx and .docx are: save what is in it as text in UTF-8",
}


def kind_of_file(path: str | Path) -> str | None:
    """What is wrong with the kind of a file, by its first bytes (an image, an archive, UTF-16, …); None for one to be read."""
    with open(path, "rb") as file:
        beginning = file.read(32)
    if json.detect_encoding(beginning).startswith(("utf-16", "utf-32")):  # with a mark or without, by its zeros
        return "is UTF-16: save the file as UTF-8"
    return next((kind for magic, kind in KINDS.items() if beginning.startswith(magic)), None)


def read_object(path: str | Path) -> dict:
    """The JSON object in a file of settings. Raises: UserError."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if isinstance(value, dict):
            return value
        reason = "must be one JSON object: write or fetch it again"
    except OSError as error:
        reason = f"is missing or cannot be read ({error.strerror}): correct the path, or fetch the file"
    except (ValueError, RecursionError) as error:  # not UTF-8, too
        reason = kind_of_file(path) or f"is not JSON ({error}): write or fetch it again"
    raise UserError(f"{path}: {reason}")
