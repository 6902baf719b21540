"""The command line of a script: flags with their help, what a file of flags adds, and numbers out of range."""

import argparse
import sys

from support.errors import Problems, UserError
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


def with_config(parser: argparse.ArgumentParser, argv: list[str] | None) -> list[str]:
    """The command line with what `--config FILE` holds put before it, so that a flag on the line wins.

    The file is a JSON object {flag's name: value}, as train.py writes it. Raises: UserError.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config")
    path = only_config.parse_known_args(argv)[0].config
    if path is None:
        return argv
    settings = read_object(path, f"--config {path}")
    known, flags = vars(parser.parse_args([])), []
    with Problems() as problems:
        for name, value in settings.items():
            if name not in known or name == "config":
                problems.append(f"--config {path}: there is no flag --{name}")
            elif isinstance(known[name], bool):
                if not isinstance(value, bool):
                    problems.append(f"--config {path}: {name} must be true or false")
                flags += [f"--{name}"] if value else []
            elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
                flags.append(f"--{name}={value}")
            elif value is not None:
                problems.append(f"--config {path}: {name} must be a number or a text")
    try:
        parser.parse_args(flags)
    except UserError as error:
        raise UserError(*(f"--config {path}: {problem}" for problem in error.problems)) from None
    return flags + argv


def number_problems(args, least: dict[str, int]) -> list[str]:
    """Which of the integer flags are below their least value, or beyond what 32 bits hold."""
    return [
        f"--{name} {value}: must be from {low} to 2³²−1"
        for name, low in least.items()
        if (value := getattr(args, name)) is not None and not low <= value < 2**32
    ]
