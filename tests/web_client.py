"""The page served as a user serves it, and a client that speaks to it as the page's own script does."""

import json
import re
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
DESC_PATH = ROOT / "data/sample/profiles-zh_desc.json"
FORM = {  # what the page sends with every question
    "role": "李白",
    "description": "盛唐诗人",
    "compare": False,
    "do_sample": False,
    "max_new_tokens": 12,
    "temperature": 0.3,
    "top_p": 0.85,
    "top_k": 5,
    "repetition_penalty": 1.05,
    "seed": None,
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
    """One browser tab, without the browser."""

    def __init__(self, url: str, language: str = "en", **kwargs):
        self.http = httpx.Client(base_url=url, timeout=60, headers={"accept-language": language}, **kwargs)
        self.session = uuid.uuid4().hex
        self.functions = {call["api_name"]: call for call in self.http.get("/config").json()["dependencies"]}

    def post(self, body, path: str = "/gradio_api/queue/join") -> httpx.Response:
        content = body if isinstance(body, (str, bytes)) else json.dumps(body)
        return self.http.post(path, content=content, headers={"content-type": "application/json"})

    def join(self, function: str, *values, event=None) -> httpx.Response:
        call = {"fn_index": self.functions[function]["id"], "data": list(values), "session_hash": self.session}
        return self.post(call | {"event_data": event})

    def messages(self):
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))

    def call(self, function: str, *values, event=None) -> dict:
        """The outcome of one event: {"data": […]} or {"error": message}."""
        response = self.join(function, *values, event=event)
        if response.status_code != 200:
            return response.json()
        for message in self.messages():
            if message["msg"] == "process_completed" and message["event_id"] == response.json()["event_id"]:
                return message["output"]
        raise AssertionError("the server closed the stream")

    def put(self, function="ask", question=(), event=None, **changes) -> dict:
        return self.call(function, None, *question, *(FORM | changes).values(), event=event)

    def ask(self, question: str, **changes) -> str:
        """The whole answer to a question, as the page shows it."""
        asked = self.put(question=[question], **changes)
        assert "error" not in asked, asked
        return self.shown(self.call("answer", None))[-1]

    @staticmethod
    def shown(output: dict, column: int = 1) -> list[str]:
        """The texts in the chat window."""
        assert "error" not in output, output
        return [bubble["content"][0]["text"].replace("\u2060", "") for bubble in output["data"][column]]


def squeezed(text: str) -> str:
    """Without white space, which a browser folds, and the invisible joiner."""
    return re.sub(r"[\s\u2060]+", "", text)
