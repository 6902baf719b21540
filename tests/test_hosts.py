"""Who may call the page, and what a wrong password costs."""

import asyncio

from support.page import hosts

OPEN = {"host": "localhost:9090"}


ALLOWED = [{"host": f"{name}:9090"} for name in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST", "chat.example")]


ALLOWED += [OPEN | {"origin": "http://localhost:9090"}, OPEN | {"origin": "https://Chat.example"}]


HOSTS = ["evil.example", "evil.example:9191", "localhost.evil.example", "", "192.0.2.1", "[", "0.0.0.0:9090"]


ORIGINS = ["http://evil.example", "http://localhost:1", "null", "http://["]


STRANGE = [*({"host": host} for host in HOSTS), *(OPEN | {"origin": origin} for origin in ORIGINS)]


STRANGE += [OPEN | {"content-length": str(9 << 20)}, OPEN | {"path": "/gradio_api/upload"}]


def test_names_and_pages_of_others_are_refused():
    """What a name that its owner points at the loopback would do (DNS rebinding), and what another site's page would."""
    gate = hosts.Gate(None, **hosts.guards("0.0.0.0", ["Chat.example"])[0].kwargs)
    for headers in ALLOWED + STRANGE:
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        refused = gate.refusal({"headers": raw, "path": headers.get("path", "/")}) is not None
        assert refused == (headers in STRANGE), headers


def test_a_wrong_password_takes_a_second(tmp_path, monkeypatch):
    """One after the other. The file may be one of Windows."""
    (tmp_path / "auth").write_bytes(b"\xef\xbb\xbfanna:se:cret\r\n")
    slept, yielding = [], asyncio.sleep

    async def sleep(seconds):
        slept.append(f"begin {seconds}")
        await yielding(0)
        slept.append("end")

    async def knock():
        allowed = hosts.doorkeeper(hosts.account_of(tmp_path / "auth"))
        return await asyncio.gather(*(allowed("anna", password) for password in ("se:cret", "se:cret\r", "se")))

    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert asyncio.run(knock()) == [True, False, False] and slept == ["begin 1", "end"] * 2
