"""The chat page's script: its arguments, one answer on the terminal, and the settings that the page begins with."""

import json
import socket
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from web_client import ASKED, CHANGED, DESC_PATH, OWN, PROFILES, greedy, whole

import web_demo
from support.errors import UserError
from support.page.hosts import account_of


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
    flags = ["--model_path", tmp_path, "--desc_path", tmp_path / "roles.json", "--auth_file", tmp_path / "auth"]
    lines = run(*flags, "--device", 7, "--role", "c").splitlines()
    expected = ["config.json: is missing", "--device 7", "auth: must hold USER:PASSWORD", "--role c"]
    expected += [f"{role}.png: the portrait of {role} cannot be read as a picture" for role in "ab"]
    for words in expected:
        assert sum(words in line for line in lines) == 1, (words, lines)
    assert all(line.startswith("error: ") for line in lines)
    assert "--engine: has a model of its own" in run("--engine", "http://127.0.0.1:1/v1", "--adapter_path", "x")


def test_a_port_that_is_taken_or_none(run):
    with socket.create_server(("127.0.0.1", 0)) as used:
        for port in (used.getsockname()[1], 70000):
            line = run("--model_path", "nowhere", "--port", port).splitlines()[-1]
            assert line.startswith(f"error: 127.0.0.1:{port}: cannot listen there (")


@pytest.mark.parametrize("account", [None, ":a", "a:", "guest", "a:b\nc:d"])
def test_an_account_that_is_none(tmp_path, account):
    """A BOM before it: test_page.py."""
    if account:
        (tmp_path / "auth").write_text(account)
    with pytest.raises(UserError, match="--auth_file .*auth: (cannot be read|must hold USER:PASSWORD)"):
        account_of(tmp_path / "auth")


def test_ask_prints_one_greedy_answer(run, speaker, tmp_path):
    """A profile that leaves little room is told at the start, and stands in nobody else's way."""
    (tmp_path / "profiles.json").write_text(json.dumps({"李白": "盛唐诗人", "长人": "酒\u0301" * 3500}))
    flags = ["--desc_path", tmp_path / "profiles.json", "--device", "cpu", "--ask", "你是谁？", "--role"]
    printed, answer = run(*flags, "李白", fails=False), speaker.answer(ASKED, greedy(256))
    assert printed.startswith(whole(answer) + "\nwarning: ") and "profiles.json: the profile of 长人 takes " in printed
    assert "error: persona and question have " in run(*flags, "长人")


@pytest.mark.parametrize("name, password", [("0.0.0.0", False), ("0.0.0.0", True), ("127.0.0.1", False)])
def test_listening_to_others_without_a_password_is_warned_about(run, monkeypatch, name, password):
    given = {}
    monkeypatch.setattr(web_demo.gr.Blocks, "launch", lambda *args, **kwargs: given.update(kwargs) or (None, "", None))
    monkeypatch.setattr(web_demo.gr.Blocks, "block_thread", lambda self: None)
    monkeypatch.setenv("WEB_DEMO_AUTH", "guest:a:b") if password else None
    printed = run("--device", "cpu", "--server_name", name, fails=False)
    assert (f"warning: whoever reaches {name}" in printed) == (name == "0.0.0.0" and not password)
    assert given["auth"] == (("guest", "a:b") if password else None) and given["server_name"] == name


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


def test_each_model_reads_its_own_earlier_answers(speaker, monkeypatch):
    """What the base model would say beside the tuned one: it has not said what the tuned one has."""
    (page := web_demo.Page(speaker, PROFILES)).blocks()
    said, growing = {"text": "甲", "base": "乙", "state": "done"}, {"text": "", "base": "", "state": "stopped"}
    turns = [{"question": "一", "versions": [said], "shown": 0}, {"question": "二", "versions": [growing], "shown": 0}]
    kept = {"role": "李白", "chats": {"李白": [{"greeting": "", "turns": turns}]}, "shown": {"李白": 0}}
    values = {page.chats: kept, page.growing: growing, page.personas: {}, page.description: "诗人"}
    values |= {switch: switch.value for switch in page.switches} | {page.compare: True}
    heard = {}

    def answer(messages, settings, begun="", strength=1.0):
        heard[strength] = [message["content"] for message in messages[1:]]
        yield "好", "done"

    monkeypatch.setattr(speaker, "answer", answer)
    page.busy.add("visitor")
    list(page.answer(values, SimpleNamespace(session_hash="visitor", headers={})))
    assert heard == {1: ["一", "甲", "二"], 0.0: ["一", "乙", "二"]}
