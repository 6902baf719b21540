"""What a browser may send to web_demo.py, and the message it gets when it sends anything else.

Gradio's own checks stay out of the way: they speak English only, and a value of a wrong type ends in a traceback. So each
value comes through a `checked_…` function here, and each request through the `Gate`.
"""

import json
import re
import socket
import unicodedata
from pathlib import Path

import gradio as gr
from starlette.requests import Request
from starlette.responses import JSONResponse

TEXTS = json.loads(Path(__file__).with_name("page_texts.json").read_text(encoding="utf-8"))  # language → key → text
MAX_NAME, MAX_DESCRIPTION, MAX_QUESTION, MAX_ROUNDS = 40, 2000, 8000, 100  # characters; rounds of a conversation
MAX_BODY = 4 << 20  # bytes of a request: somebody who pastes a megabyte is still told so in words
SETTINGS = {  # type, lowest, highest, step; the sliders keep to it, and what arrives is checked against it
    "max_new_tokens": (int, 1, 2048, 1),
    "temperature": (float, 0.05, 2.0, 0.05),
    "top_p": (float, 0.05, 1.0, 0.05),
    "top_k": (int, 0, 100, 1),
    "repetition_penalty": (float, 1.0, 2.0, 0.05),
    "seed": (int, -1, 2**32 - 1, 1),  # -1, or nothing: a random one
}
JOINER = "\u2060"  # takes no space and breaks no line


def say(request, key: str, **values) -> str:
    """A text of the page, in the browser's language where TEXTS has it. `what` among the values names a field."""
    wanted = request.headers.get("accept-language", "")[:2]
    texts = TEXTS.get(wanted, TEXTS["en"])
    if "what" in values:
        values["what"] = texts[values["what"]]
    return texts[key].format(**values)


class Refusal(gr.Error):
    """A message for the visitor instead of an answer; see `say`."""

    def __init__(self, request, key: str, **values):
        super().__init__(say(request, key, **values), title=say(request, "refused"), print_exception=False)


def checked_text(request, what: str, text, most: int) -> str:
    if not isinstance(text, str):
        raise Refusal(request, "not_text", what=what)
    if len(text) > most:
        raise Refusal(request, "too_many", what=what, count=len(text), most=most)
    text = text.replace("\r\n", "\n").replace(JOINER, "")
    if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t" for letter in text):
        raise Refusal(request, "control", what=what)
    if not text.strip():
        raise Refusal(request, "blank", what=what)
    return text


def checked_switch(request, what: str, value) -> bool:
    if not isinstance(value, bool):
        raise Refusal(request, "not_switch", what=what)
    return value


def checked_settings(request, do_sample, *values) -> dict:
    """`do_sample` and the values in the order of SETTINGS, as `Speaker.answer` takes them."""
    settings = {"do_sample": checked_switch(request, "do_sample", do_sample)}
    for (name, (kind, low, high, _)), value in zip(SETTINGS.items(), values):
        if name == "seed" and (value is None or value == -1):
            settings[name] = None
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high or kind(value) != value:
            raise Refusal(request, "not_number", what=name, low=low, high=high)
        settings[name] = kind(value)
    return settings


def literal(text: str) -> str:
    """Text that the browser shows as it is: gr.Chatbot would make `<b>` bold type, and fetch `<img>` from anywhere."""
    return re.sub(r"[<&](?=[\w/!?#])", rf"\g<0>{JOINER}", text)


def no_file(value: dict) -> dict:
    """For `json.loads`: refuse what gradio would take for a file, and read or fetch by itself."""
    if "path" in value:
        raise ValueError("a file")
    return value


def event_field(event: gr.EventData, name: str):
    """What the browser says about an event, or None where it says nothing."""
    try:
        return getattr(event, name)
    except (AttributeError, TypeError):
        return None


def checked_round(request, event: gr.EventData, count: int) -> int:
    """The round, out of `count`, of the bubble that an event is about: question and answer make a round."""
    index = event_field(event, "index")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index // 2 < count:
        raise Refusal(request, "no_round")
    return index // 2


# ---------------------------------------------------------------- connections


def port_problems(server_name: str, port: int) -> list[str]:
    """Why the page cannot listen there, if it cannot."""
    if not 0 < port < 65536:
        return [f"--port {port}: must be from 1 to 65535"]
    try:
        family, *_, address = socket.getaddrinfo(server_name, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        return [f"{server_name}:{port}: cannot listen there ({why}): give another --port or --server_name"]
    return []


class Gate:
    """ASGI middleware that lets through what the page itself needs: no upload, no file, no proxy, no other API."""

    OPEN = re.compile(
        r"/|/(config|theme\.css|favicon\.ico|manifest\.json|login|logout|login_check)/?|/(static|assets|svelte)/.*"
        r"|/gradio_api/(queue/join|queue/data|cancel|reset|heartbeat/\w+|startup-events|login_check|token|app_id)/?"
    )
    # Whatever an answer may contain, the browser loads nothing from another host and sends nothing to one.
    HEADERS = {
        "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; "
        "form-action 'self'; frame-ancestors 'self'",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    def __init__(self, app, demo: gr.Blocks):
        self.app, self.demo = app, demo

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a websocket, which the page does not use
            return None

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in self.HEADERS.items()]
            await send(message)

        request = Request(scope, receive)
        status, key, body = 404, "no_path", b""
        if self.OPEN.fullmatch(request.url.path):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    break
            status, key = self.verdict(request, body)
        if key is None:
            left = [{"type": "http.request", "body": body}]

            async def replay():
                return left.pop() if left else await receive()

            return await self.app(scope, replay, send_with_headers)
        message = say(request, key, what="question", count=len(body), most=MAX_QUESTION)
        await JSONResponse({"error": message, "detail": message}, status)(scope, receive, send_with_headers)

    def verdict(self, request, body: bytes) -> tuple[int, str | None]:
        """(200, None), or an HTTP status and the key of the text that says why not."""
        if len(body) > MAX_BODY:
            return 413, "too_many"
        path = request.url.path.rstrip("/")
        if path.endswith("/queue/data"):  # gradio prints a traceback for a session that has asked for nothing
            known = request.query_params.get("session_hash") in self.demo._queue.pending_messages_per_session
            return (200, None) if known else (404, "no_call")
        if not path.endswith("/queue/join"):
            return 200, None
        try:  # a call of one of the page's functions, with as many values as it takes, none of them a file
            call = json.loads(body, object_hook=no_file)
            inputs, values = self.demo.fns[call["fn_index"]].inputs, call["data"]
            fits = len(values) == len(inputs) and not any(isinstance(value, (dict, list)) for value in values)
            fits = fits and re.fullmatch(r"\w{1,64}", call["session_hash"]) is not None
        except (ValueError, TypeError, KeyError, RecursionError):
            fits = False
        return (200, None) if fits else (422, "no_call")
