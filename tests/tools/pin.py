"""Write constraints.txt: every package of this environment at its version.

    python3 tests/tools/pin.py

Pins of packages that only another Python or system needs stay as they are, and so does the head of the file.
"""

import re
from importlib.metadata import distributions
from pathlib import Path

FILE = Path(__file__).parents[2] / "constraints.txt"


def main():
    lines = FILE.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    pins = dict(line.split("==") for line in lines if line and line not in head)
    for package in distributions():
        name = re.sub("[-_.]+", "-", package.name).lower()
        pins[name] = package.version.split("+")[0]  # 2.13.0+cpu and 2.13.0+cu130 are one release
    pins.pop("pip", None)
    lines = [*head, *(f"{name}=={pins[name]}" for name in sorted(pins))]
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
