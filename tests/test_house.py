"""The rules that keep the house in order: who may import whom, and how long a file may be."""

import ast

import pytest
from conftest import ROOT

HOUSE = {"baichuan": set(), "ground": set(), "dialogues": {"ground"}, "model": {"ground", "dialogues", "baichuan"}}
HOUSE["utils"] = {"model", *HOUSE["model"]}  # the book's library
HOUSE |= dict.fromkeys(("training", "scores", "page"), {"utils", *HOUSE["utils"]})
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"utils"}
HOUSE |= dict.fromkeys(SCRIPTS, {*HOUSE, "data_helper"})
FILES = [path.relative_to(ROOT) for folder in ("*", "baichuan/*", "support/**/*") for path in ROOT.glob(f"{folder}.py")]


def room(first: str, second: str = "", *_) -> str:
    """The room of a module, given by the parts of its name, or of a file, by those of its path."""
    if first != "support":
        return first.removesuffix(".py")
    return second if second in HOUSE else "ground"


def imported(path) -> set[str]:
    """The rooms of all modules that a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:  # with a level it stays in its room
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {room(*name.split(".")) for name in names}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_from_the_rooms_below_it_and_can_be_read_in_one_sitting(path):
    own = room(*path.parts)
    assert imported(path) & {*HOUSE, "tests"} <= {own, *HOUSE[own]}
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 350
