"""The chat page's script: its arguments, one answer on the terminal, and the settings that the page begins with."""

import io
import json
import os
import re
import shutil
import socket
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from conftest import ImpatientTimer
from starlette.applications import Starlette
from starlette.testclient import TestClient
from web_client import ASKED, CHANGED, DESC_PATH, OWN, PROFILES, free_port

import web_demo
from baichuan.generation_utils import messages_to_ids
from support.errors import Problems, UserError
from support.model.answering import answer_batch, greedy
from support.page import chats
from support.page.hosts import access, account_of


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
    """Told before the model is looked for."""
    with socket.create_server(("127.0.0.1", 0)) as used:
        for name in ("127.0.0.1", "127.0.0.2"):  # gradio tries the first one for any
            line = run("--model_path", "nowhere", "--server_name", name, "--port", used.getsockname()[1]).splitlines()[
                -1
            ]
            assert line.startswith(f"error: {name}:{used.getsockname()[1]}: cannot listen there (")
    for port in ("0", "-1", "65536", "abc", "9" * 5000):
        (line,) = run("--model_path", "nowhere", "--port", port).splitlines()
        assert line.startswith("error: argument --port: ") and port in line


def launched_with(server_name="127.0.0.1", allowed_hosts=(), root_path="") -> dict:
    with Problems() as problems:
        names = {"server_name": server_name, "allowed_hosts": allowed_hosts, "root_path": root_path}
        return access(SimpleNamespace(**names, port=0, auth_file=None, ask=""), problems)[0]


def test_a_page_that_listens_on_all_addresses(run, monkeypatch):
    """It says where others reach it, goes by the machine's names and any address, and refuses others' names in a line."""
    own = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "192.0.2.7"), (socket.AF_INET6, "2001:db8::7")]
    cards = {"all": [SimpleNamespace(family=family, address=address) for family, address in own]}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: cards)
    monkeypatch.setattr(socket, "gethostname", lambda: "GPU1.lab")
    monkeypatch.setattr(socket, "getfqdn", lambda: "gpu1.lab.example")
    allowed = ["192.0.2.7", "203.0.113.9", "[2001:db8::1]", "GPU1.lab", "gpu1", "gpu1.local", "gpu1.lab.example"]
    names = ["evil.example", "gpu1.evil.example", *(f"{number}.example" for number in range(200))]
    refused = [*names, "evil.example", "*.evil.example", "\x1b[31mred", "x" * 300, ""]

    def visit(blocks):
        with httpx.Client(timeout=60) as browser:
            for host in allowed + refused:
                answer = browser.get(f"{blocks.local_url}theme.css", headers={"host": f"{host}:1"})
                assert answer.status_code == (200 if host in allowed else 400), host
        assert all(blocks.app.state_holder[f"visitor {number}"] for number in range(150))
        assert len(blocks.app.state_holder.session_data) == 100  # visitors of whom it holds anything
        blocks.close()

    monkeypatch.setattr(web_demo.gr.Blocks, "block_thread", visit)
    port = free_port()
    printed = run("--device", "cpu", "--server_name", "00.0.0.0", "--port", port, fails=False)
    assert f"answers on http://192.0.2.7:{port}\n" in printed
    assert re.findall("warning: (.*) was refused: .*--allowed_hosts (.*)", printed) == [(n, n) for n in names[:100]]


NAME = "role.example"
TYPED = {
    NAME: [
        "ROLE.example",
        *(f"{NAME}{end}" for end in (".", ":9396")),
        *(f"https://{NAME}{end}" for end in ("", "/", ":1/")),
    ],
    "a.example": ["*.example", "*"],
    "[fe80::1]": ["fe80::1", "[FE80::1]", "http://[fe80:0:0::1]:9396"],
    "xn--qf1az4m.xn--fiqs8s": ["角色.中国"],
    "192.168.1.5": ["192.168.1.5:9396"],
}


@pytest.mark.parametrize("typed, host", [(typed, host) for host in TYPED for typed in TYPED[host]])
def test_a_name_that_is_allowed_may_be_typed_as_people_do(typed, host):
    """Asked as browsers ask, with the port."""
    app = Starlette(**launched_with(allowed_hosts=[typed])["app_kwargs"])
    for name, allowed in {host: True, "[::1]": True, "other.test": typed == "*"}.items():
        answer = TestClient(app).get("/", headers={"host": f"{name}:9396"})
        assert (answer.text != "Invalid host header") == allowed, name
    assert {launched_with(server_name=name)["server_name"] for name in ("::1", "[::1]")} == {"[::1]"}


def test_a_path_and_names_that_cannot_be_meant(run):
    assert {launched_with(root_path=typed)["root_path"] for typed in ("chat", "/chat", "/chat/", "//chat")} == {"/chat"}
    assert launched_with(root_path="/")["root_path"] == ""
    address = launched_with(root_path="https://role.example/chat/")
    assert address["root_path"] == "https://role.example/chat"  # and gradio's own name for it may be typed
    assert TestClient(Starlette(**address["app_kwargs"])).get("/", headers={"host": "role.example"}).status_code == 404
    for typed in ("ftp://x/chat", "role.example/chat", "C:/Git/chat", "/a b", "/chat?x", "https:///chat"):
        assert f"error: --root_path {typed}: must be a path" in run("--model_path", "none", "--root_path", typed)
    names = ["a b", "*example", "a.*.b", "192.168.1.0/24", "http://[", "a..b", "1:2:3", "https://role.example/chat"]
    told = run("--model_path", "none", "--allowed_hosts", *names)
    assert [f"error: {name}: is no host's name" in told for name in names] == [True] * 8


@pytest.mark.parametrize("account", [None, ":a", "a:", "guest", "a:b\nc:d"])
def test_an_account_that_is_none(tmp_path, account):
    """A BOM before it: test_page.py."""
    if account:
        (tmp_path / "auth").write_text(account)
    with pytest.raises(UserError, match="--auth_file .*auth: (cannot be read|must hold USER:PASSWORD)"):
        account_of(tmp_path / "auth")


def test_ask_prints_one_greedy_answer(run, checkpoint, speaker, tmp_path):
    """The one of predict.py, whatever generation_config.json says. A profile that leaves little room is told at the start."""
    plain = greedy(speaker.own_settings, 256)
    (answer, _), *_ = answer_batch(speaker.model, speaker.tokenizer, [ASKED], plain)
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    settings = json.loads((model / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "typical_p": 0.2, "epsilon_cutoff": 0.1}
    settings |= {"suppress_tokens": speaker.tokenizer.text_to_ids(answer)[:3], "max_new_tokens": 256}
    (model / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "profiles.json").write_text(json.dumps({"李白": "盛唐诗人", "长人": "酒\u0301" * 3500}))
    flags = ["--desc_path", tmp_path / "profiles.json", "--model_path", model, "--device", "cpu", "--ask", "你是谁？"]
    printed = run(*flags, "--role", "李白", fails=False)
    assert printed.startswith(f"{answer}\nwarning: ") and "profiles.json: the profile of 长人 takes " in printed
    assert "error: persona and question have " in run(*flags, "--role", "长人")


def test_ask_prints_an_answer_as_it_grows(run, monkeypatch, speaker):
    """Each piece before the next one is computed; what goes before is told on stderr."""
    terminal, flushed, seen = io.StringIO(), [""], []
    terminal.flush = lambda: flushed.append(terminal.getvalue())

    def answer(self, *_):
        for text in ("床", "床前\n", "床前\n明月"):
            seen.append(flushed[-1])
            yield text, "stopped"
        yield text, "done"

    monkeypatch.setattr(web_demo.Speaker, "load", lambda *args: speaker)
    monkeypatch.setattr(web_demo.Speaker, "stream", answer)
    monkeypatch.setattr("support.command_line.Timer", ImpatientTimer)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        told = run("--device", "cpu", "--ask", "你是谁？", fails=False)
    assert seen == ["", "床", "床前\n"] and terminal.getvalue() == "床前\n明月\n"
    assert re.fullmatch("reading the persona of .* and the question …\n", told)


def test_an_engine_is_asked_through_the_proxy_that_the_page_goes_past(run, monkeypatch):
    found = []

    class Engine(web_demo.Server):
        def check(self):
            found.append(os.environ["no_proxy"])
            raise UserError("seen")

    monkeypatch.setattr(web_demo, "Server", Engine)
    monkeypatch.setattr(web_demo, "NO_PROXY", "a.example")
    assert "error: seen" in run("--engine", "http://engine.example/v1", "--ask", "你是谁？")
    assert found == ["a.example"]


@pytest.mark.parametrize("name, password", [("0.0.0.0", False), ("0.0.0.0", True), ("127.0.0.1", False)])
def test_listening_to_others_without_a_password_is_warned_about(run, monkeypatch, name, password):
    given = {}
    monkeypatch.setattr(web_demo.gr.Blocks, "launch", lambda *args, **kwargs: given.update(kwargs) or (None, "", None))
    monkeypatch.setattr(web_demo.gr.Blocks, "block_thread", lambda self: None)
    monkeypatch.setenv("WEB_DEMO_AUTH", "\ufeffguest :a:b\r\n") if password else None
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
    monkeypatch.setattr(speaker.own_settings, "max_new_tokens", 4096)  # beyond the end of the slider
    (page := web_demo.Page(speaker, PROFILES)).blocks()
    assert page.settings["max_new_tokens"].value == 2048


def test_numbers_that_the_page_shows(speaker, monkeypatch):
    """The third of four answers, in the second conversation; the seed of another attempt; what is too long."""
    (page := web_demo.Page(speaker, PROFILES)).blocks()
    said = [{"text": text, "base": "", "state": "done"} for text in "甲乙丙丁"]
    first, second = ([{"question": text, "versions": said, "shown": 2}] for text in ("一", "二"))
    conversations = [{"greeting": "", "turns": turns} for turns in (first, second)]
    values = {page.chats: {"role": "李白", "chats": {"李白": conversations}, "shown": {"李白": 1}}, page.growing: {}}
    values |= {page.personas: {}, page.description: "诗人", page.question: ""}
    values |= {switch: switch.value for switch in page.switches} | {page.settings["seed"]: 2**32 - 1}
    visit = web_demo.Visit(page, values, SimpleNamespace(session_hash="visitor", headers={}))
    assert [option["label"] for option in visit.options()] == ["‹ Previous answer 2/4", "Next answer 4/4 ›"]
    shown = visit.view()[page.number]
    assert shown.choices == [("1. 一", 0), ("2. 二", 1)] and shown.value == 1
    assert visit.settings()["seed"] == 1  # 2³² − 1 + 2
    monkeypatch.setattr(speaker, "words", lambda *_: [("甲", 2.0), ("乙", -0.5)])
    visit.colour = True
    assert visit.coloured()[page.words].label == "Words by what fine-tuning changed (sum +1.5 nats)"
    monkeypatch.setattr(speaker.model.config, "model_max_length", 20)
    needed = len(messages_to_ids(speaker.tokenizer, visit.prompt()))
    with pytest.raises(web_demo.Refusal, match=f"have {needed} tokens, .* in the model's 20"):
        page.begin(visit)


def test_each_model_reads_its_own_earlier_answers(speaker, monkeypatch):
    """What the base model would say beside the tuned one: it has not said what the tuned one has.

    Where the model has no adapter, it is asked once, though the box is ticked from another time.
    """
    (page := web_demo.Page(speaker, PROFILES)).blocks()
    said, growing = {"text": "甲", "base": "乙", "state": "done"}, {"text": "", "base": "", "state": "stopped"}
    turns = [{"question": "一", "versions": [said], "shown": 0}, {"question": "二", "versions": [growing], "shown": 0}]
    kept = {"role": "李白", "chats": {"李白": [{"greeting": "", "turns": turns}]}, "shown": {"李白": 0}}
    values = {page.chats: kept, page.growing: chats.growing(kept), page.personas: {}, page.description: "诗人"}
    values |= {switch: switch.value for switch in page.switches} | {page.compare: True}
    heard = {}

    def answer(messages, settings, begun="", strength=1.0):
        heard[strength] = [message["content"] for message in messages[1:]]
        yield "好", "done"

    monkeypatch.setattr(speaker, "stream", answer)
    page.busy.add("visitor")
    for adapter, base in ((None, {}), (speaker.model, {0.0: ["一", "乙", "二"]})):
        monkeypatch.setattr(speaker, "adapter", adapter)
        list(page.stream(values, SimpleNamespace(session_hash="visitor", headers={})))
        assert heard == {1: ["一", "甲", "二"]} | base
