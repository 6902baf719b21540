"""A script's errors: one line for each problem, and no traceback."""

import errno
import functools
import os
import re
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout


class UserError(Exception):
    """What the user can put right. Each argument is one problem, printed as one `error:` line."""

    @property
    def problems(self) -> list[str]:
        return [str(problem) for problem in self.args]


class OneProcessError(UserError):
    """A problem that other processes of the run may not have. Each process that has it prints it."""


MOST_PROBLEMS = 10  # lines told at most: a file in the wrong format would otherwise print thousands


class Problems(list):
    """All that is wrong at the start, told together: used as a context, it raises a UserError if anything was found.

    with Problems() as problems:
        device = problems.of(pick_device, args.device)      # None when that raised a UserError
        problems += ["…"]
    """

    def of(self, function, *arguments):
        try:
            return function(*arguments)
        except UserError as error:
            self += error.problems

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        problems = list(dict.fromkeys(self))  # each once: two models may lack the same
        if problems and kind is None:
            if len(problems) > MOST_PROBLEMS:
                problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more"]
            raise UserError(*problems)


def entry_point(main):
    """Decorate a script's `main(argv=None)`: a UserError or a failing disk becomes lines on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapper(argv=None):
        warnings.filterwarnings("ignore", category=FutureWarning)  # between the libraries; no user could act on them
        with errors_as_lines():
            return main(argv)

    return wrapper


@contextmanager
def slow_imports(parse_args, name: str):
    """Use around the imports that take seconds: a script that is run (`name` is "__main__") reads its arguments first.

    So --help and a typing error are answered at once, and an environment that lacks a package is told in a line. `main`
    parses them again, since it may be called with others.
    """
    if name != "__main__":
        yield
        return
    with errors_as_lines():
        parse_args()
        yield


class Lasting:
    """A stream that outlives its reader: what is printed to a terminal that was closed, or to a broken pipe, goes nowhere."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):  # a terminal without Chinese shows \u5b59, not a traceback
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        attribute = getattr(self.stream, name)
        return functools.partial(self._unless_gone, attribute) if name in ("write", "flush") else attribute

    def _unless_gone(self, function, *arguments):
        try:
            return function(*arguments)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # what is still buffered goes there, too
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise


@contextmanager
def errors_as_lines():
    """Errors that are no defect of the program end the process with a line each; others keep their traceback.

    A run goes on when nobody can read any more what it prints.
    """
    try:
        with redirect_stdout(sys.stdout and Lasting(sys.stdout)), redirect_stderr(sys.stderr and Lasting(sys.stderr)):
            yield
            print(end="", flush=True)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as shells report Ctrl-C
    except Exception as error:
        file = getattr(error, "filename", None)
        where = f"{file}: " if file else ""
        of_one_process = isinstance(error, OneProcessError) or out_of_memory(error)
        if isinstance(error, UserError):
            problems = error.problems
        elif isinstance(error, ImportError):
            problems = [import_problem(error)]
        elif out_of_memory(error):
            problems = [f"too little memory is free: {where}{first_line(error)}"]
        elif isinstance(error, OSError):  # disk full, permission, a directory where a file should be, …
            problems = [f"{where}{error.strerror or error}"]
        else:
            raise
        if of_one_process or os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes on a host one speaks
            for problem in problems:
                print("error:", " ".join(problem.split("\n")), file=sys.stderr)
        raise SystemExit(2) from None


def import_problem(error: ImportError) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return first_line(error)
    return f'{error.name} is not installed for this Python: run "make setup", then use .venv/bin/python3'


@contextmanager
def blaming(what: str):
    """Use around a library that reads a user's file: any error it raises becomes the UserError "{what}: {reason}".

    Libraries share no narrower class: a damaged file fails anywhere in json, torch, pickle, safetensors or transformers.

    Raises: UserError; MemoryError for want of memory, for which no file is to blame.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise MemoryError(f"{what}: {first_line(error)}") from error
        raise UserError(f"{what}: {error.__cause__ or error}") from error


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. On a GPU torch has a class for it, on the CPU only the message says so.

    The class is known by its name, since torch may not be imported.
    """
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or bool(re.search("out of memory|allocate memory|ALLOC_FAILED|bad_alloc", str(error)))


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class if it has no message."""
    text = getattr(error, "strerror", None) or str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
