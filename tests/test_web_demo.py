"""The chat page without a browser: its arguments, the settings it begins with, and a real server."""

import json
import os
import socket
from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest
from web_client import ASKED, CHANGED, DESC_PATH, OWN, PROFILES, Server, conversation, free_port, greedy, whole

import web_demo
from tests.tools import load_chat

# Started before the page, this writes down every address that the page's process connects to or looks up.
WATCHED = """
import os, sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print(repr(args[event == "socket.connect"]), file=open(os.environ["WATCH"], "a"))
sys.addaudithook(watch)
sys.path.insert(0, os.getcwd())
import web_demo
web_demo.main()
"""


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("server")
    environment = dict(os.environ, WATCH=str(directory / "connections"))
    yield (server := Server(directory / "log", checkpoint, program=("-c", WATCHED), env=environment))
    server.close()


# ---------------------------------------------------------------- arguments


@pytest.fixture
def run(capsys, checkpoint):
    def run(*arguments, fails=True) -> str:
        """What the script prints, in this process."""
        with pytest.raises(SystemExit, match="^2$") if fails else nullcontext():
            web_demo.main(list(map(str, ["--desc_path", DESC_PATH, "--model_path", checkpoint, *arguments])))
        return "".join(capsys.readouterr())

    return run


def test_all_problems_are_told_at_once(run, tmp_path):
    profiles = {role: {"description": "诗人", "portrait": f"{role}.png"} for role in "ab"}
    (tmp_path / "roles.json").write_text(json.dumps(profiles))
    for file in ("auth", "b.png"):
        (tmp_path / file).write_text("nobody")
    flags = ["--model_path", tmp_path, "--adapter_path", tmp_path, "--desc_path", tmp_path / "roles.json"]
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        lines = run(*flags, "--device", 7, "--auth_file", tmp_path / "auth", "--port", port).splitlines()
    expected = ["no weights", "--device 7", "--auth_file", "adapter_config.json"]
    expected += [f"{role}.png: the portrait of {role} cannot be read as a picture" for role in "ab"]
    for words in [*expected, f"127.0.0.1:{port}: cannot listen there (Address already in use)"]:
        assert sum(words in line for line in lines) == 1, (words, lines)
    assert all(line.startswith("error: ") for line in lines)


REFUSED = {f"--port {port}": "--port" for port in (-1, 0, 70000, "x")} | {
    "--ask 你是谁？ --role 曹操": "--role 曹操",
    "--engine http://127.0.0.1:1/v1 --adapter_path x": "--engine: has a model of its own",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused_arguments(run, flags):
    assert REFUSED[flags] in run(*flags.split())


def test_ask_prints_one_greedy_answer(run, speaker, tmp_path):
    """A profile that leaves little room is told at the start, and stands in nobody else's way."""
    (tmp_path / "profiles.json").write_text(json.dumps({"李白": "盛唐诗人", "长人": "酒\u0301" * 3500}))
    flags = ["--desc_path", tmp_path / "profiles.json", "--device", "cpu", "--ask", "你是谁？", "--role"]
    printed, answer = run(*flags, "李白", fails=False), speaker.answer(ASKED, greedy(256))
    assert printed.startswith(whole(answer) + "\nwarning: ") and "profiles.json: the profile of 长人 takes " in printed
    assert "--ask: persona and question have " in run(*flags, "长人")


@pytest.mark.parametrize("name, password", [("0.0.0.0", False), ("0.0.0.0", True), ("127.0.0.1", False)])
def test_listening_to_others_without_a_password_is_warned_about(run, monkeypatch, name, password):
    monkeypatch.setattr(web_demo.gr.Blocks, "launch", lambda *args, **kwargs: (None, "", None))
    monkeypatch.setattr(web_demo.gr.Blocks, "block_thread", lambda self: None)
    monkeypatch.setenv("WEB_DEMO_AUTH", "guest:a") if password else None
    printed = run("--device", "cpu", "--server_name", name, "--port", free_port(), fails=False)
    assert (f"warning: whoever reaches {name}" in printed) == (name == "0.0.0.0" and not password)


def test_an_adapter_that_is_no_model_or_does_not_fit(run, page_adapter, tmp_path):
    told = run("--model_path", page_adapter, "--ask", "你是谁？")
    assert told.startswith(f"error: {page_adapter}: is an adapter: ") and told.endswith("as --adapter_path\n")
    for name, kept in (("adapter_config.json", None), ("adapter_model.safetensors", 9999)):
        (tmp_path / name).write_bytes(Path(page_adapter, name).read_bytes()[:kept])
    assert "adapter_model.safetensors: cannot be read, fetch it again" in run(
        "--adapter_path", tmp_path, "--ask", "谁？"
    )


UNSET = {"max_new_tokens": 512, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0, "seed": -1}


def test_the_page_begins_with_the_models_own_settings(speaker, monkeypatch):
    """Where a model names none, with transformers' own defaults, not the ends of the sliders."""
    for expected in (OWN, UNSET):
        (page := web_demo.Page(speaker, PROFILES)).blocks()
        assert expected.items() <= {name: box.value for name, box in page.settings.items()}.items()
        for name in CHANGED.keys() - {"seed"}:
            monkeypatch.setattr(speaker.own_settings, name, None)


# ---------------------------------------------------------------- a real server


def test_whoever_signs_in_reaches_the_page(checkpoint, tmp_path):
    (tmp_path / "auth").write_text("guest:a:b\n")
    server = Server(tmp_path / "log", checkpoint, "--auth_file", str(tmp_path / "auth"))
    with httpx.Client(base_url=server.url) as client:
        for password, login, config in (("a", 400, 401), ("a:b", 200, 200)):
            assert client.get("/config").status_code == 401
            assert client.post("/login", data={"username": "guest", "password": password}).status_code == login
            assert client.get("/config").status_code == config
    server.close()
    assert "warning" not in server.log


def test_many_visitors_at_once_get_their_own_answers(server, speaker):
    """tests/tools/load_chat.py is the larger one, with times and memory."""
    waits, conversations = load_chat.run(server.url, visitors=8, questions=2, tokens=8)
    assert len(waits) == 16
    for seed, kept in enumerate(conversations):
        asked, (role, profile) = [], next(iter(PROFILES.items()))
        for turn in kept["chats"][role][0]["turns"]:
            messages = conversation(*asked, turn["question"], role=role, description=profile["description"])
            settings = greedy(8, do_sample=True, seed=seed, temperature=2.0, top_p=1.0, top_k=0)
            assert [version["text"] for version in turn["versions"]] == [whole(speaker.answer(messages, settings))]
            asked += [turn["question"], turn["versions"][0]["text"]]


def test_nothing_phones_home_and_no_traceback(server):
    """Runs last in this file: whatever was sent above and is here, half requests, leaves the log clean."""
    head, port = "GET / HTTP/1.1\r\nHost: localhost\r\n", int(server.url.rpartition(":")[2])
    upgrade, half = f"{head}Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n", f"{head}Content-Length: 50\r\n\r\n{{"
    for sent in ("GET", "GET / HTTP/9.9\r\n\r\n", "\x16\x03\x01", upgrade, half, f"{head}Content-Length: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(sent.encode("latin-1"))
    for host, status in ((f"localhost:{port}", 200), ("evil.example", 403)):
        assert httpx.get(server.url, headers={"host": host}).status_code == status
    assert load_chat.Visitor(server.url, max_new_tokens=1).ask("你是谁？")  # it still lives
    assert "Traceback" not in server.log and "Exception" not in server.log, server.log
    addresses = server.log_path.with_name("connections").read_text().splitlines()
    assert addresses and all("127.0.0.1" in address or address in ("'localhost'", "None") for address in addresses)
