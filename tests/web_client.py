"""The page served as a user serves it."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
DESC_PATH = ROOT / "data/sample/profiles-zh_desc.json"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`python3 web_demo.py …` in a process of its own; `log` is what it has printed. Without a model: for --engine."""

    def __init__(self, log: Path, model_path: str | None, *flags: str, program=("web_demo.py",), env=None, port=None):
        self.log_path = log
        command = [sys.executable, *program, "--desc_path", str(DESC_PATH), *flags]
        command += ["--model_path", model_path, "--device", "cpu"] if model_path else []
        for _ in range(5):  # a free port may be taken by another program before the page listens there
            self.port = port or free_port()
            self.url = f"http://127.0.0.1:{self.port}"
            with open(log, "w") as output:
                streams = {"stdout": output, "stderr": subprocess.STDOUT}
                self.process = subprocess.Popen([*command, "--port", str(self.port)], cwd=ROOT, env=env, **streams)
            deadline = time.monotonic() + 300  # of a page that neither answers nor ends
            while "answers on" not in self.log and self.process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if "cannot listen there" not in self.log:
                break
        if "answers on" not in self.log:
            self.process.kill()
            self.process.wait()
            raise AssertionError(self.log)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def close(self):
        self.process.terminate()
        self.process.wait(30)


def squeezed(text: str) -> str:
    """Without white space, which a browser folds."""
    return re.sub(r"\s+", "", text)
