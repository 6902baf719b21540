"""Who may call the page: under which names, and with which password; and whether it can listen."""

import os
import re
import socket
from ipaddress import IPv6Address
from pathlib import Path

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from support.errors import Problems, UserError, blaming

LOCAL = ["localhost", "127.0.0.1", "[::1]"]
IPV6, NAME = r"\[?([^]/]*:[^]/]*:[^]/]*)]?", r"((?:\*\.)?[\w.-]+?|\*)\.?"  # *.example: all names below it; *: any
HOST = re.compile(rf"(?:https?://)?(?:{IPV6}|{NAME})(?::\d+)?/?", re.IGNORECASE)
ROOT = re.compile(r"(https?://[^/?#\s]+|(?![^/]*\.))/*([^\s:?#\\]*?)/*")  # role.example/chat is neither


def access(args, problems: Problems) -> dict:
    """What gradio's `launch` takes of the flags. What is wrong with them is added to the problems."""
    name = problems.of(host_of, args.server_name) or ""
    typed = [*args.allowed_hosts, *re.findall("^https?://[^/]+", args.root_path)]
    hosts = [problems.of(host_of, host) for host in typed]
    launch = {"root_path": problems.of(root_of, args.root_path), "auth": problems.of(account_of, args.auth_file)}
    if args.ask is None:
        problems.of(refuse_taken_port, name.strip("[]"), args.port)
    # A name of others that points here (DNS rebinding) is refused, and so is an unknown one.
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, name, *hosts], www_redirect=False)
    return launch | {"server_name": name, "server_port": args.port, "app_kwargs": {"middleware": [guard]}}


def host_of(typed: str) -> str:
    """The Host that a browser sends, without its port, of what people type: a URL, a port, capitals. Raises: UserError."""
    try:
        address, name = HOST.fullmatch(typed).groups()
        return f"[{IPv6Address(address)}]" if address else name.lower().encode("idna").decode()
    except (AttributeError, ValueError):  # no match; what is like an address, or a name, and is none
        raise UserError(f"{typed}: is no host's name or address, such as role.example or 192.168.1.5") from None


def root_of(typed: str) -> str:
    """/chat, of chat and /chat/, too; or a whole address, which gradio takes as well. Raises: UserError."""
    if not (found := ROOT.fullmatch(typed)):
        raise UserError(f"--root_path {typed}: must be a path, such as /chat, or an address, https://role.example/chat")
    return found[1] + (found[2] and f"/{found[2]}")


def refuse_taken_port(address: str, port: int):
    """Raises: UserError where the page could not listen, before a model is loaded in vain."""
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        socket.create_server((address, port), family=family).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{address}:{port}: cannot listen there ({error}): give another --port or --server_name"
        ) from error


def account_of(auth_file: Path | None) -> tuple[str, str] | None:
    """User and password, from a file or else from the environment. Raises: UserError."""
    account, where = os.environ.get("WEB_DEMO_AUTH"), "WEB_DEMO_AUTH"
    if auth_file:
        where = f"--auth_file {auth_file}"
        with blaming(f"{where}: cannot be read"):
            account = auth_file.read_text(encoding="utf-8")
    if account is None:
        return None
    user, _, password = account.removeprefix("\ufeff").strip().partition(":")
    if not user or not password or "\n" in user + password:
        raise UserError(f"{where}: must hold USER:PASSWORD, neither of them empty")
    return user.strip(), password  # gradio strips what is typed as the user
