"""Many visitors at once on the chat page, over loopback: no answer may be lost, or be another visitor's."""

import json
import re
import secrets
import time
from concurrent.futures import ThreadPoolExecutor

import httpx


class Visitor:
    """A browser without a browser: what the page's components hold, by name, and the queue that changes them."""

    def __init__(self, url: str, **settings):
        self.http, self.session = httpx.Client(base_url=f"{url}/gradio_api", timeout=None), secrets.token_hex(8)
        config, self.steps, self.names, self.values = httpx.get(f"{url}/config").json(), {}, {}, {}
        for box in config["components"]:
            props, unset = box["props"], "" if box["type"] == "textbox" else None
            label = "".join(re.findall(r'"key": "(\w+)"', props.get("label") or ""))
            self.names[box["id"]] = name = props.get("storage_key") or props.get("elem_id") or label or box["id"]
            self.values[name] = props.get("value", props.get("default_value", unset))
        for step in filter(lambda step: step["backend_fn"], reversed(config["dependencies"])):
            self.steps |= {name: step for name in (step["api_name"], *(event for _, event in step["targets"]))}
        self.heart = self.http.send(self.http.build_request("GET", f"/heartbeat/{self.session}"), stream=True)
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
        return [self.do(name) for name in ("submit", "answer", "end")][1] - start


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
