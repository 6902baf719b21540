"""The page served as a user serves it, and a client that speaks to it as the page's own script does."""

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
DESC_PATH = ROOT / "data/sample/profiles-zh_desc.json"
FORM = {  # what the page sends with every question
    "role": "李白",
    "description": "盛唐诗人",
    "base": False,
    "strength": 1.0,
    "do_sample": False,
    "max_new_tokens": 12,
    "temperature": 0.3,
    "top_p": 0.85,
    "top_k": 5,
    "repetition_penalty": 1.05,
    "seed": -1,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`python3 web_demo.py …` in a process of its own; `log` is what it has printed."""

    def __init__(self, log: Path, model_path: str, *flags: str, program=("web_demo.py",), env=None):
        self.log_path = log
        command = [sys.executable, *program, "--model_path", model_path, "--desc_path", str(DESC_PATH), *flags]
        for _ in range(5):  # a free port may be taken by another program before the page listens there
            self.url = f"http://127.0.0.1:{(port := free_port())}"
            with open(log, "w") as output:
                self.process = subprocess.Popen(
                    [*command, "--device", "cpu", "--port", str(port)],
                    cwd=ROOT,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=env,
                )
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


class Visitor:
    """One browser, without the browser: it keeps its conversation, and sends all of it with each question."""

    def __init__(self, url: str, language: str = "en", **kwargs):
        self.http = httpx.Client(base_url=url, timeout=60, headers={"accept-language": language}, **kwargs)
        self.http.get("/")  # for the cookie
        self.messages: list[dict] = []

    def body(self, question: str, **changes) -> dict:
        values = FORM | changes
        body = {name: values.pop(name) for name in ("role", "description", "base", "strength")}
        return body | {"messages": [*self.messages, {"role": "user", "content": question}], "settings": values}

    def post(self, body, path: str = "/answer", **headers) -> httpx.Response:
        content = body if isinstance(body, (str, bytes)) else json.dumps(body)
        return self.http.post(path, content=content, headers={"content-type": "application/json"} | headers)

    def lines(self, question: str, begun: str = "", **changes) -> list[dict]:
        """All that is said to a question; what is refused has one line, {"error"}."""
        response = self.post(self.body(question, **changes) | {"begun": begun})
        return [json.loads(line) for line in response.text.splitlines()]

    def ask(self, question: str, **changes) -> str:
        """The whole answer to a question, which the next question goes on from."""
        lines = self.lines(question, **changes)
        assert "cut" in lines[-1], lines
        self.messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": lines[-1]["text"]},
        ]
        return lines[-1]["text"]


def squeezed(text: str) -> str:
    """Without white space, which a browser folds."""
    return re.sub(r"\s+", "", text)
