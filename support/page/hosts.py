"""Who may call the page: its own name, its own pages, at an address where it can listen."""

import asyncio
import hmac
import ipaddress
import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from support.errors import UserError

MAX_BODY = 8 << 20  # bytes of a request; a browser keeps some 5 MB of conversations
LOCAL = {"localhost", "127.0.0.1", "::1"}


class Gate:
    """ASGI middleware. Refused are names of others that point here, pages of others that call, and uploads.

    Args:
        names: under which visitors may call the page. public: those of them that a proxy may serve it under.
    """

    def __init__(self, app, names: set[str], public: set[str]):
        self.app, self.names, self.public = app, names, public

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and (why := self.refusal(scope)):
            return await PlainTextResponse(f"{why}\n", 403)(scope, receive, send)
        await self.app(scope, receive, send)

    def refusal(self, scope) -> str | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if host_name(f"//{host}") not in self.names:
            return "The page is not served under this name; --allowed_hosts adds one."
        # A proxy may call by another name than the visitor, whose Origin then holds the name that he typed.
        if origin and origin.partition("://")[2] != host and host_name(origin) not in self.public:
            return "Another page may not call this one."
        if scope["path"].endswith("/upload") or int(headers.get("content-length", 0)) > MAX_BODY:
            return "This is more than the page takes."


def host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def guards(server_name: str, allowed_hosts: list[str]) -> list[Middleware]:
    """For gradio's app_kwargs."""
    public = set(map(str.lower, allowed_hosts))
    return [Middleware(Gate, names=(LOCAL | public | {server_name.lower()}) - {"0.0.0.0", "::"}, public=public)]


def account_of(auth_file: Path | None) -> str | None:
    """USER:PASSWORD of a file, or else of the environment. Raises: UserError."""
    account, where = os.environ.get("WEB_DEMO_AUTH"), "WEB_DEMO_AUTH"
    if auth_file:
        where = f"--auth_file {auth_file}"
        try:
            account = auth_file.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: cannot be read: {error}") from error
    if account is not None and not re.fullmatch("[^:\n]+:[^\n]+", account):
        raise UserError(f"{where}: must hold USER:PASSWORD, neither of them empty")
    return account


def doorkeeper(account: str):
    """For gradio's auth: whether USER:PASSWORD is right. A wrong one takes a second, one after the other."""
    turn = asyncio.Lock()

    async def allowed(user: str, password: str) -> bool:
        if hmac.compare_digest(f"{user}:{password}".encode(), account.encode()):
            return True
        async with turn:
            await asyncio.sleep(1)
        return False

    return allowed


def is_loopback(server_name: str) -> bool:
    try:
        return ipaddress.ip_address(server_name).is_loopback
    except ValueError:
        return server_name == "localhost"


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
