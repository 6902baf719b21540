"""Who may call the page: under which names, and with which password; and whether it can listen."""

import os
import re
import socket
from ipaddress import IPv6Address, ip_address
from itertools import chain
from pathlib import Path

import psutil
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from support.errors import Problems, UserError, blaming

LOCAL = ["localhost", "127.0.0.1", "[::1]"]
IPV6, NAME = r"\[?(?=[^:]*:[^:]*:)([\da-f:.]+)]?", r"((?:\*\.)?[\w.-]{1,253}?|\*)\.?"  # *.example: below it; *: any
HOST = re.compile(rf"(?:https?://)?(?:{IPV6}|{NAME})(?::\d+)?/?", re.IGNORECASE)
ROOT = re.compile(r"(https?://[^/?#\s]+|(?![^/]*\.))/*([^\s:?#\\]*?)/*")  # role.example/chat is neither


def access(args, problems: Problems) -> tuple[dict, list[str]]:
    """What gradio's `launch` takes of the flags, and where others reach the page. What is wrong is added to the problems."""
    typed = (args.server_name, *args.allowed_hosts, *re.findall("^https?://[^/]+", args.root_path))
    name, *more = (problems.of(host_of, host) or "" for host in typed)
    launch = {"root_path": problems.of(root_of, args.root_path), "auth": problems.of(account_of, args.auth_file)}
    urls = problems.of(listens_on, name.strip("[]"), args.port) if args.ask is None else None
    hosts = [re.escape(host).replace(r"\*", ".*") for host in (*LOCAL, name, *more)]
    if urls:  # any address, too: only a name can be made to point here, and a container does not know its machine's
        full, short = socket.gethostname(), socket.gethostname().split(".")[0]
        hosts += [r"\[.*]|[\d.]+", *map(re.escape, (full, short, f"{short}.local", socket.getfqdn()))]
    guard = Middleware(guarded, re.compile("|".join(hosts), re.IGNORECASE))
    return launch | {"server_name": name, "server_port": args.port, "app_kwargs": {"middleware": [guard]}}, urls


def guarded(app, hosts: re.Pattern):
    """An ASGI app that refuses any other Host, of a page that had its name point here (DNS rebinding), and logs it once."""
    refused = {"*"}

    async def serve(scope, receive, send):
        typed = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        host = Problems().of(host_of, typed.replace("*", " ")) or "*"
        if scope["type"] == "lifespan" or hosts.fullmatch(host):
            return await app(scope, receive, send)
        if host not in refused and len(refused) <= 100:  # a stranger cannot fill the log
            refused.add(host)
            print(f"warning: {host} was refused: if this page is meant, add --allowed_hosts {host}", flush=True)
        await PlainTextResponse("Invalid host header", 400)(scope, receive, send)

    return serve


def host_of(typed: str) -> str:
    """The Host that a browser sends, without its port, of what people type: a URL, a port, capitals. Raises: UserError."""
    try:
        address, name = HOST.fullmatch(typed).groups()
        if name and not name.strip("0123456789."):
            return socket.inet_ntoa(socket.inet_aton(name))  # as browsers do, of 0 and 127.1, too
        return f"[{IPv6Address(address)}]" if address else name.lower().encode("idna").decode()
    except (AttributeError, OSError, ValueError):  # no match; what is like an address, or a name, and is none
        raise UserError(f"{typed}: is no host's name or address, such as role.example or 192.168.1.5") from None


def root_of(typed: str) -> str:
    """/chat, of chat and /chat/, too; or a whole address, which gradio takes as well. Raises: UserError."""
    if not (match := ROOT.fullmatch(typed)):
        raise UserError(f"--root_path {typed}: must be a path, such as /chat, or an address, https://role.example/chat")
    address, path = match.groups()
    return f"{address}/{path}" if path else address


def listens_on(name: str, port: int) -> list[str]:
    """The URLs by which others reach a page that listens there; none on this machine's own. Raises: UserError."""
    try:
        socket.create_server(("127.0.0.1", port)).close()  # gradio tries the port there, whatever it is given
        family = socket.AF_INET6 if ":" in name else socket.AF_INET
        with socket.create_server((name, port), family=family) as server:
            address = ip_address(server.getsockname()[0])
    except OSError as error:
        remedy = "give another --port or --server_name"
        raise UserError(f"{name}:{port}: cannot listen there ({error}): {remedy}") from error
    cards = chain.from_iterable(psutil.net_if_addrs().values())
    all_here = [ip_address(card.address) for card in cards if card.family == family]
    addresses = all_here if address.is_unspecified else [address]
    return [f"http://{host_of(str(ip))}:{port}" for ip in addresses if not (ip.is_loopback or ip.is_link_local)]


def account_of(auth_file: Path | None) -> tuple[str, str] | None:
    """User and password, from a file or else from the environment. Raises: UserError."""
    where = f"--auth_file {auth_file}" if auth_file else "WEB_DEMO_AUTH"
    with blaming(f"{where}: cannot be read"):
        account = auth_file.read_text(encoding="utf-8") if auth_file else os.environ.get(where)
    if account is None:
        return None
    user, _, password = account.removeprefix("\ufeff").strip().partition(":")
    if not user or not password or "\n" in user + password:
        raise UserError(f"{where}: must hold USER:PASSWORD, neither of them empty")
    return user.strip(), password  # gradio strips what is typed as the user
