"""The same answers from every way to generate, what the comparison of releases reports, and every Python at hand.

README.md names the versions of Python that were tried.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

TOOLS = Path(__file__).parent / "tools"
sys.path.insert(0, str(TOOLS))
import versions  # noqa: E402


def test_every_way_to_generate_gives_the_answers_of_whole_passes():
    """Under the installed transformers; in a process of its own, since warnings are given once."""
    run = subprocess.run([sys.executable, TOOLS / "same_answers.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    assert len(results.pop("answers")) > 100
    assert len(results) == 12 and {check: found for check, found in results.items() if found != "ok"} == {}


@pytest.mark.parametrize(
    ("wrong", "status", "told"),
    [
        ({}, 0, ""),
        ({"5.24.1": {"single": "other tokens"}}, 1, ""),
        ({"5.24.1": {"answers": "[[8]]"}}, 1, ""),  # right by itself, and different from the lowest
        ({"5.25.0": {"single": "other tokens"}}, 0, "warning: transformers 5.25.0, outside the tested range"),
    ],
)
def test_a_wrong_release_fails_the_comparison_or_is_a_warning(monkeypatch, capsys, wrong, status, told):
    index = "transformers (5.25.0)\nAvailable versions: 5.25.0, 5.24.1, 5.24.0, 5.17.0, 5.10.4, 5.10.2, 5.9.0, 4.57.6\n"
    monkeypatch.setattr(versions, "pip", lambda *arguments: index)
    monkeypatch.setattr(versions, "tested_range", lambda: ((5, 10), (5, 24)))
    monkeypatch.setattr(versions, "environment", lambda version, envs_dir: version)
    right = {"single": "ok", "answers": "[[7]]"}
    monkeypatch.setattr(versions, "same_answers", lambda version: right | wrong.get(version, {}))
    assert versions.main(["--ci"]) == status
    captured = capsys.readouterr()
    rows = [line.split("|")[1].strip() for line in captured.out.splitlines() if line.startswith("| 5")]
    assert rows == ["5.10.4", "5.24.1", "5.25.0"]
    assert told in captured.err and ("warning" in captured.err) == bool(told)


def test_the_versions_of_python_at_hand_compile_every_file():
    """Each that is installed at least reads the code."""
    versions = filter(None, (shutil.which(f"python3.{minor}") for minor in (11, 12, 13, 14)))
    sources = sorted(map(str, [*ROOT.glob("*.py"), *(ROOT / "baichuan").glob("*.py")]))
    check = (
        "import ast, json, sys\nfor path in json.load(sys.stdin): ast.parse(open(path, encoding='utf-8').read(), path)"
    )
    for python in versions:
        if subprocess.run([python, "--version"], capture_output=True).returncode:
            continue  # pyenv's name for one that is not chosen
        subprocess.run([python, "-c", check], input=json.dumps(sources), text=True, check=True)
