"""Many visitors of a chat page that runs on this machine: no answer may be lost, or be another visitor's.

python3 tests/tools/load_chat.py http://127.0.0.1:9090       # 40 visitors at once, 3 questions each
python3 tests/tools/load_chat.py http://127.0.0.1:9090 500   # page loads: what the page's process holds afterwards
"""

import json
import re
import secrets
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import httpx
import psutil


class Visitor:
    """A browser without a browser: what the page's components hold, by name, and the queue that changes them."""

    def __init__(self, url: str, kept: dict | None = None, **settings):
        self.http, self.session = httpx.Client(base_url=f"{url}/gradio_api", timeout=None), secrets.token_hex(8)
        config, self.steps, self.names, self.values = httpx.get(f"{url}/config", timeout=60).json(), {}, {}, {}
        for box in config["components"]:
            props, unset = box["props"], "" if box["type"] == "textbox" else None
            label = "".join(re.findall(r'"key": "(\w+)"', props.get("label") or ""))
            self.names[box["id"]] = name = props.get("storage_key") or props.get("elem_id") or label or box["id"]
            self.values[name] = props.get("value", props.get("default_value", unset))
        for step in filter(lambda step: step["backend_fn"], reversed(config["dependencies"])):
            self.steps |= {name: step for name in (step["api_name"], *(event for _, event in step["targets"]))}
        self.heart = self.http.send(self.http.build_request("GET", f"/heartbeat/{self.session}"), stream=True)
        self.values |= {"role-play-2-chats": kept} if kept else {}
        self.do("load")
        self.values |= settings

    def do(self, name: str) -> float:
        """Call a listener, and take over what it returns. Returns the moment of its first update."""
        step, session, moments = self.steps[name], {"session_hash": self.session}, []
        body = {"data": [self.values[self.names[number]] for number in step["inputs"]], "fn_index": step["id"]}
        self.http.post("/queue/join", json=body | session).raise_for_status()
        with self.http.stream("GET", "/queue/data", params=session) as stream:
            for message in (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")):
                moments += [time.monotonic()] if "output" in message else []
                if message["msg"] == "process_completed":
                    assert message["success"], message
                    for name, new in zip(map(self.names.get, step["outputs"]), message["output"]["data"]):
                        update = isinstance(new, dict) and "__type__" in new
                        self.values[name] = new.get("value", self.values[name]) if update else new
        return moments[0]

    def ask(self, question: str) -> float:
        """Returns seconds to the first text."""
        self.values["question"], start = question, time.monotonic()
        return [self.do(name) for name in ("submit", "stream", "end")][1] - start


def run(url: str, visitors: int, questions: int, tokens: int) -> tuple[list[float], list[dict]]:
    """Seconds to the first text of each answer, and the conversation of each visitor. Visitor n asks with seed n."""

    def converse(number: int):
        visitor = Visitor(url, do_sample=True, seed=number, temperature=2, top_p=1, top_k=0, max_new_tokens=tokens)
        asked = [f"我是{number}号，这是第{round + 1}问。" for round in range(questions)]
        waits, kept = [visitor.ask(question) for question in asked], visitor.values["role-play-2-chats"]
        visitor.heart.close()
        turns = kept["chats"][kept["role"]][0]["turns"]
        assert [turn["question"] for turn in turns] == asked, kept
        assert all(turn["versions"][0]["text"].strip() for turn in turns), kept
        return waits, kept

    with ThreadPoolExecutor(visitors) as pool:
        waits, conversations = zip(*pool.map(converse, range(visitors)))
    return sum(waits, []), list(conversations)


def load_pages(url: str, count: int):
    """Prints MB that the page's process holds, as visitors come and go whose browsers keep 200 turns."""
    held = (found for found in psutil.net_connections("tcp") if found.status == "LISTEN")
    page = psutil.Process(next(found.pid for found in held if found.laddr.port == httpx.URL(url).port))
    (first := Visitor(url, max_new_tokens=1)).ask("你是谁？" * 5)
    kept = first.values["role-play-2-chats"]
    (turn,) = turns = kept["chats"][kept["role"]][0]["turns"]
    turn["versions"][0]["text"] = "床前明月光，疑是地上霜。" * 16
    turns *= 200
    for loaded in range(count + 1):
        if loaded in (0, count // 2, count):
            print(f"{loaded} page loads: {page.memory_info().rss / 1e6:.0f} MB", flush=True)
        Visitor(url, kept).heart.close()


if __name__ == "__main__":
    address, *loads = sys.argv[1:]
    if loads:
        load_pages(address, int(loads[0]))
    else:
        waits, _ = run(address, visitors=40, questions=3, tokens=64)
        print(
            f"{len(waits)} answers, none lost; first text after {median(waits):.1f} s (median), {max(waits):.1f} s at most"
        )
