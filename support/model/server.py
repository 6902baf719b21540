"""Answers from a server with OpenAI's interface (vLLM, SGLang, llama.cpp) that serves the LLaMA export."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from multiprocessing.pool import ThreadPool

from transformers import GenerationConfig

from support.errors import UserError, blaming, first_line
from support.model.answering import Answer

MARKERS = re.compile(r"<reserved_10[67]>|</?s>|<unk>")  # for a server, in any text; docs/merging.md
# No proxy of the environment stands between this machine and itself. Servers print 0.0.0.0 as their address.
HERE = re.compile(r"https?://((?:[\w-]+\.)*localhost|127\.[\d.]+|0\.0\.0\.0|\[::1?])(:|/|$)", re.IGNORECASE)


def without_markers(text: str) -> str:
    """A text without what a server takes for a marker. Repeated, since what stood around one may spell another."""
    while MARKERS.search(text):
        text = MARKERS.sub("", text)
    return text


class Server:
    """Args: url, such as http://127.0.0.1:8080/v1; model, its name on the server, by default the first one there.

    On the chat page it stands where a Speaker stands, and has what a Speaker has.
    """

    adapter, stand_in, own_settings = None, False, GenerationConfig(do_sample=True)

    def __init__(self, url: str, model: str | None = None):
        self.url, self.model = url, model

    def check(self) -> "Server":
        """Reach the server, and return this. Raises: UserError: the `openai` package is missing, or no such server is there."""
        try:
            import openai
        except ModuleNotFoundError:
            raise UserError("--engine needs the package openai: pip install openai -c constraints.txt") from None
        self.refused = openai.BadRequestError
        # A question may wait in the server's queue for longer than the 10 minutes of the client's own limit.
        timeout, key = openai.Timeout(None, connect=10.0), os.environ.get("OPENAI_API_KEY", "none")
        with self.reached():
            http = openai.DefaultHttpxClient(trust_env=not HERE.match(self.url))
            self.client = openai.OpenAI(base_url=self.url, api_key=key, timeout=timeout, http_client=http)
            models = [model.id for model in self.client.with_options(timeout=60.0).models.list()]
        if not models or self.model not in (None, *models):
            raise UserError(f"--engine_model {self.model}: {self.url} serves {', '.join(models) or 'no model'}")
        self.model = self.model or models[0]
        return self

    def reached(self):
        """A context for each request, whose errors (openai's, httpx's, an answer that is none) become a UserError."""
        remedy = "start the server as docs/merging.md shows, and give its address up to /v1"
        return blaming(f"--engine {self.url}: no answer from it ({remedy})")

    def generate_all(self, conversations: Sequence[tuple[int, list[dict]]], at_once: int, max_new_tokens: int):
        """Yield (number, greedy Answer) of each (number, conversation), as they come. Raises: UserError.

        at_once: how many the server has before it. They may wait there as long as it takes.
        """

        def generate(numbered):
            number, messages = numbered
            with self.reached():
                choice = self._create(messages, 1.0, temperature=0, max_tokens=max_new_tokens).choices[0]
                return number, Answer(choice.message.content or "", choice.finish_reason == "stop")

        # Threads are daemons: whoever stops the run need not wait for them.
        with ThreadPool(min(at_once, len(conversations))) as pool:
            yield from pool.imap_unordered(generate, conversations)

    def fit(self, messages: list[dict], wanted: int, begun: str = "") -> tuple[None, int, bool]:
        return None, wanted, False  # the server alone knows how long its context is

    def stream(self, messages: list[dict], settings: dict, begun: str = "", **others) -> Iterator[tuple[str, str]]:
        """As `Speaker.stream`: the answer as it grows, and its state. Raises: UserError: none comes, or it is refused."""
        options, extra = {"max_tokens": settings["max_new_tokens"], "temperature": 0, "stream": True}, {}
        if settings["seed"] != -1:
            options["seed"] = settings["seed"]
        if settings["do_sample"]:
            options |= {"temperature": settings["temperature"], "top_p": settings["top_p"]}
            extra["top_k"] = settings["top_k"]
        turns, beginning = list(messages), []
        if begun:
            beginning = [{"role": "assistant", "content": begun}]
            extra |= {"add_generation_prompt": False, "continue_final_message": True}
        penalty, chunks = settings.get("repetition_penalty", 1.0), None
        text, state = begun, "cut"
        with self.reached():
            while chunks is None:
                try:
                    chunks = self._create([*turns, *beginning], penalty, extra, **options)
                except self.refused as error:  # longer than its context: without the oldest round, or the greeting
                    if len(turns) == 2:
                        raise UserError(f"the server refuses: {first_line(error)}") from error
                    del turns[1 : 3 if turns[1]["role"] == "user" else 2]
            with closing(chunks):
                for chunk in chunks:
                    for choice in chunk.choices[:1]:
                        text += choice.delta.content or ""
                        state = "done" if choice.finish_reason == "stop" else state
                        yield text, "stopped"
        yield text, state

    def _create(self, messages: list[dict], penalty: float, extra: dict | None = None, **options):
        messages = [{"role": turn["role"], "content": without_markers(turn["content"])} for turn in messages]
        # Servers take repetition_penalty from generation_config.json; llama.cpp has its own name for it.
        body = {"repetition_penalty": penalty, "repeat_penalty": penalty} | (extra or {})
        return self.client.chat.completions.create(model=self.model, messages=messages, extra_body=body, **options)
