"""What every script here does alike: an error is one line, a file is whole or absent."""

import argparse
import functools
import glob
import os
import re
import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors import SafetensorError


class UserError(Exception):
    """What the user can put right. Each argument is one problem, printed as one `error:` line."""

    @property
    def problems(self):
        return [str(problem) for problem in self.args]


class OneProcessError(UserError):
    """A problem that the other processes of the run do not have, so that each process tells its own."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are one line each, like every other error here, without the usage text."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (--help explains every flag)")


def entry_point(main):
    """Decorate a script's `main(argv=None)`: a UserError or a failing disk becomes lines on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapper(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a terminal without Chinese shows \u5b59, not a traceback
                stream.reconfigure(errors="backslashreplace")
        warnings.filterwarnings("ignore", category=FutureWarning)  # between the libraries; no user could act on them
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # of several processes on a host, one
        try:
            return main(argv)
        except UserError as error:
            problems = error.problems
            speaks |= isinstance(error, OneProcessError)
        except KeyboardInterrupt:
            raise SystemExit(130) from None  # as shells report Ctrl-C
        except (MemoryError, RuntimeError) as error:  # the latter is torch's, on the CPU without a class of its own
            if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
                raise
            problems, speaks = [f"too little memory is free: {first_line(error)}"], True
        except OSError as error:  # disk full, permission, a directory where a file should be, …
            where = f"{error.filename}: " if error.filename else ""
            problems = [f"{where}{error.strerror or error}"]
        for problem in problems if speaks else []:
            print("error:", " ".join(problem.split("\n")), file=sys.stderr)
        raise SystemExit(2)

    return wrapper


@contextmanager
def whole_files(*paths):
    """Open UTF-8 text files for writing, one handle a path; they appear, by rename, only once all are on disk.

    When the body raises, nothing appears and what stood there before stays.
    """
    paths = [Path(path) for path in paths]
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
    """Around what libraries write: each has its own error for a full disk, and here they become one that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OneProcessError(f"{path}: cannot be written: {first_line(error)}") from error


def number_problems(args, least: dict[str, int]) -> list[str]:
    """Which of the integer flags are below their least value, or beyond what 32 bits hold."""
    values = {name: (getattr(args, name), low) for name, low in least.items() if getattr(args, name) is not None}
    return [
        f"--{name} {value}: must be from {low} to 2³²−1"
        for name, (value, low) in values.items()
        if not low <= value < 2**32
    ]


def first_line(error: Exception) -> str:
    """Of what an error says, or its class if it says nothing."""
    text = getattr(error, "strerror", None) or str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def few(problems: list[str]) -> list[str]:
    """What is wrong in every layer is told by five lines."""
    return problems[:5] + [f"and {len(problems) - 5} more problems like these"] * (len(problems) > 5)


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
        UserError: `path` holds something already and `overwrite` is False.
    """
    path = Path(path)
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
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = left.name.split(".")[-2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


def rename_directory(temporary: Path, path: Path):
    """Give a finished directory its name, once its files are on disk; what had the name before goes."""
    put_on_disk(*temporary.rglob("*"), temporary)
    old = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    put_on_disk(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path):
    """Remove a directory, which is whole under its name until it is gone under it."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    path.rename(hidden)
    shutil.rmtree(hidden)


def put_on_disk(*paths):
    """Wait until files, and the names in directories, would outlast a power cut."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
