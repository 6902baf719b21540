"""The same answers from every way to generate, and every Python at hand.

README.md names the versions of Python that were tried.
"""

import json
import shutil
import subprocess
import sys

from conftest import ROOT


def test_every_way_to_generate_gives_the_answers_of_whole_passes():
    """Under the installed transformers; in a process of its own, since warnings are given once."""
    run = subprocess.run([sys.executable, ROOT / "tests/tools/same_answers.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    assert len(results.pop("answers")) > 100
    assert len(results) == 12 and {check: found for check, found in results.items() if found != "ok"} == {}


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
