"""Every Python at hand. README.md names the versions of Python that were tried."""

import json
import shutil
import subprocess

from conftest import ROOT


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
