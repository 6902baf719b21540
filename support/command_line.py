"""The command line of a script: flags with their help, files of flags, numbers within their range; what takes long is said."""

import argparse
import math
import os
import sys
from contextlib import contextmanager
from threading import Timer

from support.errors import UserError
from support.files import read_object


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each default to its help, but for None and [], which say nothing."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, []) else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one line for each error, as everywhere here, and without the usage text."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (--help explains every flag)")


Switch = argparse.BooleanOptionalAction  # --flag, and --no-flag where --config has switched it on


def with_config(argv: list[str] | None) -> list[str]:
    """The command line with the flags of `--config FILE` before it, so that a flag on the line wins. Raises: UserError.

    The file is a JSON object {flag's name: value}, as train.py writes it. What is wrong in it, argparse says. Its
    entry `made_with` tells of the run that wrote it, and is no flag.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config")
    path = only_config.parse_known_args(argv)[0].config
    flags = []
    settings = read_object(path) if path else {}
    settings.pop("made_with", None)
    for name, value in settings.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not None and value is not False:  # a 0 counts
            flags.append(f"--{name}={value}")
    return flags + argv


def integer(least: int, most: int = 2**32 - 1):
    """For `type=`: an integer from `least` to `most`, or to what 32 bits hold."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is no integer from {least} to {most}")
        return int(text)

    return parse


def number(least: float = 0, below: float = math.inf, positive: bool = False):
    """For `type=`: a number in [least, below), and above 0 where it has to be positive."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < below or (positive and value == 0):
            wanted = "a positive number" if positive else f"a number in [{least}, {below})"
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return parse


@contextmanager
def said_if_slow(what: str):
    """Use around what may take long: after five seconds it is said on stderr, by one of several processes on a host."""
    timer = Timer(5, print, [f"{what} …"], {"file": sys.stderr, "flush": True})
    if os.environ.get("LOCAL_RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
