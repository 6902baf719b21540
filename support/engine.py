"""Answers from a server with OpenAI's interface (vLLM, SGLang, llama.cpp) that serves the LLaMA export."""

import os
import re
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool

from baichuan.generation_utils import Answer
from support.errors import UserError, first_line

CONTROL = re.compile(r"<reserved_10[67]>|</?s>|<unk>")  # a server may take them for the markers; docs/merging.md


def without_markers(text: str) -> str:
    """Of a text, what a server takes for no marker. Where one goes, what stood around it may be another."""
    while CONTROL.search(text):
        text = CONTROL.sub("", text)
    return text


class Engine:
    """Args: url, such as http://127.0.0.1:8080/v1; model, its name on the server, by default the first one there."""

    def __init__(self, url: str, model: str | None = None):
        self.url, self.model = url, model

    def check(self):
        """Reach the server. Raises: UserError: the `openai` package is missing, or nothing that speaks so is there."""
        try:
            import openai
        except ModuleNotFoundError:
            raise UserError("--engine needs the package openai: pip install openai -c constraints.txt") from None
        self.error = openai.OpenAIError
        try:
            # A question may wait in the server's queue for longer than the 10 minutes of the client's own limit.
            timeout, key = openai.Timeout(None, connect=10.0), os.environ.get("OPENAI_API_KEY", "none")
            self.client = openai.OpenAI(base_url=self.url, api_key=key, timeout=timeout)
            models = [model.id for model in self.client.with_options(timeout=60.0).models.list()]
        except Exception as error:  # openai's, httpx's, or a page that is no list of models
            raise self.unusable(error) from error
        if self.model and self.model not in models:
            raise UserError(f"--engine_model {self.model}: {self.url} serves {', '.join(models) or 'no model'}")
        if not models:
            raise UserError(f"--engine {self.url}: serves no model")
        self.model = self.model or models[0]

    def unusable(self, error: Exception) -> UserError:
        return UserError(
            f"--engine {self.url}: no answer from it ({first_line(error)}): start the server as docs/merging.md shows, "
            "and give its address up to /v1"
        )

    def answers(
        self, asked: Sequence[tuple[int, list[dict]]], at_once: int, max_new_tokens: int
    ) -> Iterator[tuple[int, Answer]]:
        """Yield (number, greedy Answer) of each (number, conversation) asked, as they come. Raises: UserError.

        at_once: how many the server has before it. They may wait there as long as it takes.
        """

        def answer(question):
            number, messages = question
            return number, self._answer(messages, max_new_tokens)

        with ThreadPool(min(at_once, len(asked))) as pool:  # of daemons: whoever stops the run need not wait for them
            yield from pool.imap_unordered(answer, asked)

    def _answer(self, messages: list[dict], max_new_tokens: int) -> Answer:
        messages = [{"role": turn["role"], "content": without_markers(turn["content"])} for turn in messages]
        try:
            completion = self.client.chat.completions.create(
                model=self.model,
                messages=messages,
                temperature=0,
                max_tokens=max_new_tokens,
                # Servers take repetition_penalty from generation_config.json; llama.cpp has its own name for it.
                extra_body={"repetition_penalty": 1.0, "repeat_penalty": 1.0},
            )
            choice = completion.choices[0]
            return Answer(choice.message.content or "", choice.finish_reason == "stop")
        except (self.error, LookupError, AttributeError, TypeError) as error:
            raise self.unusable(error) from error
