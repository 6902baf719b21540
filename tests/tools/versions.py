"""Are answers the same under the lowest and the newest transformers? CI asks this.

    python3 tests/tools/versions.py                  # the lowest of the range, and the newest release that there is
    python3 tests/tools/versions.py 5.23.0 5.25.0    # these, inside the range or not

A release that is not the installed one goes into a directory of its own, before the installed packages, and TESTS run
under it. One outside the range may fail: a line says so.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402

from baichuan.configuration_baichuan import TESTED  # noqa: E402

TESTS = ["tests/test_same_answers.py", "tests/test_modeling_baichuan.py"]
PIP = [sys.executable, "-m", "pip"]


def newest() -> str:
    listed = subprocess.run([*PIP, "index", "versions", "transformers"], stdout=subprocess.PIPE, text=True, check=True)
    return re.match(r"transformers \((.+)\)", listed.stdout).group(1)


def passes(version: str) -> bool:
    with TemporaryDirectory() as directory:
        if version != transformers.__version__:
            subprocess.run([*PIP, "install", "-q", "--target", directory, f"transformers=={version}"], check=True)
        env = os.environ | {"PYTHONPATH": directory, "BAICHUAN_ANY_TRANSFORMERS": "1"}
        return subprocess.run([sys.executable, "-m", "pytest", *TESTS], cwd=ROOT, env=env).returncode == 0


def main(versions: list[str]) -> int:
    status = 0
    for version in dict.fromkeys(versions or [f"{TESTED[0]}.0", newest()]):  # each once
        in_range = any(version.startswith(f"{minor}.") for minor in TESTED)
        passed = passes(version)
        told = "passes" if passed else "fails"
        print(f"transformers {version}{'' if in_range else ', outside the range,'} {told}", flush=True)
        if in_range and not passed:
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
