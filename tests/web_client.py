"""The page served as a user serves it, and what its model is asked."""

import os
import re
import time
from pathlib import Path

from data_helper import persona
from support.dialogues.profiles import read_characters
from tests.forked import Fork, free_port

ROOT = Path(__file__).parent.parent
DESC_PATH = ROOT / "data/sample/profiles-zh_desc.json"
PROFILES = read_characters(DESC_PATH)

# What the page's settings send: the model's own ones, and others.
OWN = {"do_sample": True, "max_new_tokens": 256, "temperature": 0.3, "top_p": 0.85, "top_k": 5}
OWN |= {"repetition_penalty": 1.05, "seed": -1}
CHANGED = {"max_new_tokens": 3, "temperature": 0.7, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.2, "seed": 7}


class Server:
    """`python3 web_demo.py …` in a process of its own; `log` is what it has printed."""

    def __init__(self, log: Path, model_path: str, *flags: str, script="web_demo.py", env=None, port=None):
        self.log_path, self.port = log, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [script, "--desc_path", DESC_PATH, "--model_path", model_path, "--device", "cpu"]
        command += ["--port", self.port, *flags]
        log.touch()
        self.process = Fork(*command, environment=env or dict(os.environ), output=log).process
        while "answers on" not in self.log:
            assert self.process.is_alive(), self.log
            time.sleep(0.05)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def close(self):
        self.process.terminate()
        self.process.join(30)


def squeezed(text: str) -> str:
    """Without white space, which a browser folds."""
    return re.sub(r"\s+", "", text)


def conversation(*turns: str, role="李白", description="盛唐诗人") -> list[dict]:
    turns = [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return [{"role": "system", "content": persona(role, description)}, *turns]


def greedy(max_new_tokens: int, **changes) -> dict:
    return {"do_sample": False, "max_new_tokens": max_new_tokens, "repetition_penalty": 1.05, "seed": -1} | changes


def whole(answer) -> str:
    """The last text of a Speaker's (text, state) pairs."""
    return "".join(text for text, _ in list(answer)[-1:])


ASKED = conversation("你是谁？")
