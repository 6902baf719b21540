"""Who may call the page: under which names, and with which password; and whether it can listen."""

import os
import socket
from pathlib import Path

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from support.errors import UserError, blaming

LOCAL = ["localhost", "127.0.0.1", "::1"]


def guards(server_name: str, allowed_hosts: list[str]) -> list[Middleware]:
    """For gradio's app_kwargs: a name of others that points here (DNS rebinding) is refused, and so is an unknown one."""
    names = [name.lower() for name in (*LOCAL, server_name, *allowed_hosts)]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)]


def refuse_taken_port(server_name: str, port: int):
    """Raises: UserError where the page could not listen, before a model is loaded in vain."""
    try:
        family = socket.AF_INET6 if ":" in server_name else socket.AF_INET
        socket.create_server((server_name, port), family=family).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"{server_name}:{port}: cannot listen there ({error}): give another --port") from error


def account_of(auth_file: Path | None) -> tuple[str, str] | None:
    """User and password, from a file or else from the environment. Raises: UserError."""
    account, where = os.environ.get("WEB_DEMO_AUTH"), "WEB_DEMO_AUTH"
    if auth_file:
        where = f"--auth_file {auth_file}"
        with blaming(f"{where}: cannot be read"):
            account = auth_file.read_text(encoding="utf-8-sig").strip()
    if account is None:
        return None
    user, _, password = account.partition(":")
    if not user or not password or "\n" in account:
        raise UserError(f"{where}: must hold USER:PASSWORD, neither of them empty")
    return user, password
