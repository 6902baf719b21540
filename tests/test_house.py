"""The three rules that keep the house in order, and the lengths that keep it readable."""

import ast

import pytest
from conftest import ROOT

SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"utils"}


def imported(path) -> set[str]:
    """The first names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted(ROOT.glob("baichuan/*.py")), ids=lambda path: path.name)
def test_the_model_imports_nothing_of_the_project(path):
    assert not imported(path) & {*SCRIPTS, "utils", "support", "baichuan", "tests"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("support/**/*.py")), ids=lambda path: path.name)
def test_support_imports_no_script(path):
    assert not imported(path) & SCRIPTS  # utils.py is a library


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_a_script_imports_no_other_but_data_helper(path):
    assert not imported(path) & SCRIPTS - {"data_helper"}


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.py"), ROOT / "baichuan/modeling_baichuan.py"]), ids=lambda path: path.name
)
def test_a_script_can_be_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
