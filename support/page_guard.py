"""What a browser may send to web_demo.py, and the message it gets when it sends anything else.

The page runs in gradio's Server mode, with HTML of its own. Conversations stay in the browser: the server keeps no session that could be guessed,
filled or lost. A visitor is a cookie that the server has signed; it counts his places in the queue, and his sign-in.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import secrets
import socket
import time
import unicodedata
from pathlib import Path

import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from support.errors import UserError

TEXTS = json.loads(Path(__file__).with_name("page_texts.json").read_text(encoding="utf-8"))  # language → key → text
MAX_QUESTION, MAX_ANSWER = 8000, 20_000  # characters
MAX_MESSAGES = 400  # of a conversation; the model reads as many of the last as fit its context
MAX_BODY = 1 << 20  # bytes of a request
BODY_SECONDS, SEND_SECONDS = 15, 30  # that a browser may take to send a request, and to take a piece of an answer
PLACES, PLACES_OF_ADDRESS, PLACES_OF_VISITOR = 100, 50, 3  # in the queue
SETTINGS = {  # type, lowest, highest, step; the sliders keep to it, and what arrives is checked against it
    "max_new_tokens": (int, 1, 2048, 1),
    "temperature": (float, 0.05, 2.0, 0.05),
    "top_p": (float, 0.05, 1.0, 0.05),
    "top_k": (int, 0, 100, 1),
    "repetition_penalty": (float, 1.0, 2.0, 0.05),
    "seed": (int, -1, 2**32 - 1, 1),  # -1: a random one
}
STRENGTH = (float, 0.0, 1.5, 0.05)  # what the adapter's update is multiplied by


class Refusal(Exception):
    """What the visitor is told instead of an answer: the key of a text, its values, and the HTTP status."""

    def __init__(self, key: str, status: int = 422, **values):
        self.key, self.status, self.values = key, status, values


def language(request) -> str:
    wanted = request.headers.get("accept-language", "")[:2]
    return wanted if wanted in TEXTS else "en"


def say(request, key: str, **values) -> str:
    """A text of the page, in the browser's language where TEXTS has it. `what` among the values names a field."""
    texts = TEXTS[language(request)]
    if "what" in values:
        values["what"] = texts[values["what"]]
    return texts[key].format(**values)


def refused(request, refusal: Refusal) -> JSONResponse:
    return JSONResponse({"error": say(request, refusal.key, **refusal.values)}, refusal.status)


# ---------------------------------------------------------------- values


def checked_text(what: str, text, most: int) -> str:
    if not isinstance(text, str):
        raise Refusal("not_text", what=what)
    if len(text) > most:
        raise Refusal("too_many", what=what, count=len(text), most=most)
    text = text.replace("\r\n", "\n")
    if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t" for letter in text):
        raise Refusal("control", what=what)
    if not text.strip():
        raise Refusal("blank", what=what)
    return text


def checked_answer(text) -> str:
    """What the model has said, which may be anything but half a character."""
    if not isinstance(text, str):
        raise Refusal("not_text", what="answer")
    if len(text) > MAX_ANSWER:
        raise Refusal("too_many", what="answer", count=len(text), most=MAX_ANSWER)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Refusal("control", what="answer")
    return text


def checked_switch(what: str, value) -> bool:
    if not isinstance(value, bool):
        raise Refusal("not_switch", what=what)
    return value


def checked_number(what: str, value, kind: type, low, high):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or kind(value) != value:
        raise Refusal("not_number", what=what, low=low, high=high)
    return kind(value)


def checked_settings(values) -> dict:
    """`do_sample` and SETTINGS, as `Speaker.answer` takes them."""
    if not isinstance(values, dict) or values.keys() != {"do_sample", *SETTINGS}:
        raise Refusal("no_call")
    settings = {"do_sample": checked_switch("do_sample", values["do_sample"])}
    for name, (kind, low, high, _) in SETTINGS.items():
        settings[name] = checked_number(name, values[name], kind, low, high)
    if settings["seed"] == -1:
        settings["seed"] = None
    return settings


def checked_messages(messages) -> list[dict]:
    """A conversation of the visitor and the role, which ends with a question."""
    if not isinstance(messages, list) or not messages:
        raise Refusal("no_call")
    if len(messages) > MAX_MESSAGES:
        raise Refusal("too_old", most=MAX_MESSAGES // 2)
    checked = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
            raise Refusal("no_call")
        content = message.get("content")
        if message["role"] == "user":
            content = checked_text("question", content, MAX_QUESTION)
        else:
            content = checked_answer(content)
        checked.append({"role": message["role"], "content": content})
    if checked[-1]["role"] != "user":
        raise Refusal("no_call")
    return checked


# ---------------------------------------------------------------- the queue


class Place:
    """One request's place in the Line. `moved` is set whenever the visitor is to be told something new, or has left."""

    def __init__(self, visitor: str, address: str):
        self.visitor, self.address, self.gone, self.moved = visitor, address, False, asyncio.Event()


class Line:
    """Who waits for the model, in order; the first one has it. A visitor and an address have a share of it at most."""

    def __init__(self):
        self.places: list[Place] = []

    def enter(self, visitor: str, address: str) -> Place:
        if sum(place.visitor == visitor for place in self.places) >= PLACES_OF_VISITOR:
            raise Refusal("busy", 429)
        if len(self.places) >= PLACES or sum(p.address == address for p in self.places) >= PLACES_OF_ADDRESS:
            raise Refusal("full", 429)
        self.places.append(Place(visitor, address))
        return self.places[-1]

    def leave(self, place: Place):
        if place in self.places:
            self.places.remove(place)
        for other in self.places:
            other.moved.set()


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


async def read_json(request: Request) -> dict:
    """The body of a request. Raises: Refusal, also where it is too slow or too large."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise Refusal("no_call")  # a form of another page can send this without asking the browser
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise Refusal("too_large", 413, most=MAX_BODY // 1024)
        value = json.loads(body)
    except TimeoutError:
        raise Refusal("too_slow", 408) from None
    except ClientDisconnect:
        raise Refusal("no_call") from None
    except (ValueError, RecursionError):
        raise Refusal("no_call") from None
    if not isinstance(value, dict):
        raise Refusal("no_call")
    return value


class Door:
    """Who may come in: host names, origins, visitors' cookies, and the sign-in where there is a password.

    Args:
        hosts: names under which the page may be called; a name of somebody else's, pointed here, is not among them.
        account: USER:PASSWORD, or None where nobody needs to sign in.
        port: where the page is. It is in the cookie's name, since a host's pages share their cookies.
    """

    OPEN = ("/login", "/page.css", "/login.js")
    # Whatever an answer may contain, the browser loads nothing from another host and sends nothing to one.
    HEADERS = {
        "content-security-policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-store",
    }

    def __init__(self, hosts: set[str], account: str | None, port: int):
        self.hosts, self.account = hosts, account
        self.cookie = f"visitor-{port}"
        self.key = secrets.token_bytes(32)
        self.failed: dict[str, tuple[int, float]] = {}  # address → failed sign-ins, and when the next may come

    def sign(self, name: str) -> str:
        return hmac.new(self.key, name.encode(), hashlib.sha256).hexdigest()

    def visitor(self, request) -> str | None:
        """The visitor's name, if the server gave it to him. Names of those who signed in begin with "s"."""
        name, _, signature = request.cookies.get(self.cookie, "").partition(".")
        good = hmac.compare_digest(signature.encode(), self.sign(name).encode())
        return name if good and (self.account is None or name.startswith("s")) else None

    def welcome(self, response, signed_in: bool = False):
        """Make the browser a visitor."""
        name = ("s" if signed_in else "v") + secrets.token_urlsafe(16)
        response.set_cookie(self.cookie, f"{name}.{self.sign(name)}", httponly=True, samesite="strict")
        return response

    def refuse(self, request):
        """Raise: Refusal of a request under a strange name, from a strange page, or without its cookie."""
        host = request.headers.get("host", "")
        if host_name(host) not in self.hosts:
            raise Refusal("strange_host", 403)
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refusal("strange_origin", 403)
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") and (
            request.method != "GET" or request.url.path != "/"
        ):
            raise Refusal("strange_origin", 403)
        if request.url.path not in ("/", *self.OPEN) and self.visitor(request) is None:
            raise Refusal("sign_in", 401)

    def try_password(self, address: str, given) -> bool:
        """After each failure an address waits twice as long, a minute at most. Raises: Refusal while it must wait."""
        failures, free = self.failed.get(address, (0, 0.0))
        if (wait := free - time.monotonic()) > 0:
            raise Refusal("wait", 429, seconds=int(wait) + 1)
        if isinstance(given, str) and hmac.compare_digest(given.encode("utf-8", "replace"), self.account.encode()):
            self.failed.pop(address, None)
            return True
        while len(self.failed) >= 10_000:
            del self.failed[next(iter(self.failed))]
        self.failed[address] = (failures + 1, time.monotonic() + min(2**failures, 60))
        return False


def host_name(host: str) -> str:
    """localhost:9090 and [::1]:9090 without the port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()


def allowed_hosts(server_name: str, more: list[str]) -> set[str]:
    hosts = {"localhost", "127.0.0.1", "::1", server_name.lower(), *map(str.lower, more)}
    return hosts - {"0.0.0.0", "::"}


def is_loopback(server_name: str) -> bool:
    try:
        return ipaddress.ip_address(server_name).is_loopback
    except ValueError:
        return server_name == "localhost"


class Gate:
    """ASGI middleware: every request passes the Door, and every answer carries its headers."""

    def __init__(self, app, door: Door):
        self.app, self.door = app, door

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a websocket, which the page does not use
            return await send({"type": "websocket.close"})

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in self.door.HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *headers]
            await send(message)

        request = Request(scope)
        try:
            self.door.refuse(request)
        except Refusal as refusal:
            return await refused(request, refusal)(scope, receive, send_with_headers)
        await self.app(scope, receive, send_with_headers)


# ---------------------------------------------------------------- streams


def advance(stream):
    """(the answer so far, None), or ("", (whole answer, whether it was cut)) at its end; for a thread."""
    try:
        return next(stream), None
    except StopIteration as end:
        return "", end.value


class Stream:
    """An ASGI answer of JSON lines, which ends when its reader leaves, or takes nothing for SEND_SECONDS."""

    def __init__(self, lines, place: Place):
        self.lines, self.place = lines, place

    async def __call__(self, scope, receive, send):
        async def watch():
            while (await receive())["type"] != "http.disconnect":
                pass
            self.leave()

        watching = asyncio.create_task(watch())
        try:
            headers = [(b"content-type", b"application/x-ndjson")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for line in self.lines:
                if self.place.gone:
                    break
                body = json.dumps(line, ensure_ascii=False).encode() + b"\n"
                message = {"type": "http.response.body", "body": body, "more_body": True}
                await asyncio.wait_for(send(message), SEND_SECONDS)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (TimeoutError, OSError):
            self.leave()
        finally:
            watching.cancel()
            await self.lines.aclose()

    def leave(self):
        self.place.gone = True
        self.place.moved.set()


def serve(app, server_name: str, port: int, tell):
    """Serve until a signal ends it; tell(url) once it listens."""

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            try:
                await super().startup(sockets)
            except SystemExit:  # uvicorn's way to say that the port was taken while the model was loaded
                problems = port_problems(server_name, port)
                raise UserError(*problems or [f"{server_name}:{port}: cannot listen there"]) from None
            if self.started:
                name = {"0.0.0.0": "127.0.0.1", "::": "localhost"}.get(server_name, server_name)
                tell(f"http://{f'[{name}]' if ':' in name else name}:{port}")

    options = {"log_level": "critical", "access_log": False, "lifespan": "off", "server_header": False}
    Server(uvicorn.Config(app, server_name, port, limit_concurrency=400, timeout_graceful_shutdown=2, **options)).run()
