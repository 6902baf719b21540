"""The chat page without a browser: its arguments, what it answers, and what it says to everything it should not answer."""

import asyncio
import json
import os
import socket
import string
import threading
import time
import unicodedata
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from starlette.requests import Request
from test_tokenizer import pause_generation
from web_client import DESC_PATH, Server, Visitor, free_port

import web_demo
from baichuan.generation_utils import messages_to_ids
from data_helper import persona
from support import page_guard
from support.model_directory import ModelDirectory
from support.profiles import read_characters
from support.speaker import PrefixCaches, Speaker
from tests.tools import load_chat

# Started before the page, this writes down every address that the page's process connects to or looks up.
WATCHED = """
import os, sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        with open(os.environ["WATCH"], "a") as file:
            file.write(repr(args[1] if event == "socket.connect" else args[0]) + "\\n")
sys.addaudithook(watch)
sys.path.insert(0, os.getcwd())
sys.argv[0] = "web_demo.py"
import web_demo
web_demo.main()
"""


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("server")
    environment = dict(os.environ, WATCH=str(directory / "connections"))
    server = Server(directory / "log", checkpoint, program=("-c", WATCHED), env=environment)
    server.connections = directory / "connections"
    yield server
    server.close()


@pytest.fixture
def visitor(server):
    return Visitor(server.url)


@pytest.fixture(scope="module")
def speaker(checkpoint):
    return Speaker.load(checkpoint, None, torch.device("cpu"))


def conversation(*turns: str, role="李白", description="盛唐诗人") -> list[dict]:
    roles = ("user", "assistant")
    turns = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return [{"role": "system", "content": persona(role, description)}, *turns]


def greedy(max_new_tokens: int, **changes) -> dict:
    return {"do_sample": False, "max_new_tokens": max_new_tokens, "repetition_penalty": 1.05, "seed": None} | changes


def whole(texts) -> str:
    return "".join(list(texts)[-1:])


# ---------------------------------------------------------------- arguments


@pytest.fixture
def run(capsys):
    """Call the script's main, which ends with `expected`, and return what it printed; for speed, in this process."""

    def run(*arguments, expected=2):
        status = 0
        try:
            web_demo.main(list(map(str, arguments)))
        except SystemExit as exit:
            status = exit.code
        printed = capsys.readouterr()
        assert status == expected, printed.err
        return printed

    return run


def test_all_problems_are_told_at_once(run, tmp_path):
    (tmp_path / "roles.json").write_text('{\n"李白": ""\n}', encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "auth").write_text("nobody")
    flags = ["--model_path", tmp_path / "empty", "--adapter_path", tmp_path, "--desc_path", tmp_path / "roles.json"]
    result = run(*flags, "--device", "7", "--auth_file", tmp_path / "auth", "--server_name", "203.0.113.1")
    lines = result.err.splitlines()
    assert result.out == ""
    assert all(line.startswith("error: ") for line in lines)
    for words in (
        "has no weights",
        "adapter_config.json",
        "roles.json:2:",
        "--device 7",
        "--auth_file",
        "203.0.113.1:9090",
    ):
        assert sum(words in line for line in lines) == 1, (words, lines)


@pytest.mark.parametrize("port", [-1, 0, 70000, "x"])
def test_impossible_ports(run, port, checkpoint):
    result = run("--model_path", checkpoint, "--desc_path", DESC_PATH, "--port", port)
    assert len(result.err.splitlines()) == 1 and "port" in result.err


def test_port_in_use(run, server, checkpoint):
    port = server.url.rsplit(":", 1)[1]
    result = run("--model_path", checkpoint, "--desc_path", DESC_PATH, "--port", port)
    assert result.err.startswith(f"error: 127.0.0.1:{port}: cannot listen there (Address already in use)")


def test_ask_prints_one_greedy_answer(run, checkpoint, speaker):
    flags = ["--model_path", checkpoint, "--desc_path", DESC_PATH, "--device", "cpu", "--role", "张飞"]
    answer = run(*flags, "--ask", "你是谁？", expected=0).out
    description = read_characters(DESC_PATH)["张飞"]["description"]
    expected = conversation("你是谁？", role="张飞", description=description)
    settings = greedy(speaker.model.generation_config.max_new_tokens)
    assert answer.rstrip("\n") == whole(speaker.answer(expected, settings)).rstrip("\n")


def test_a_password_file_of_windows(checkpoint, tmp_path):
    (tmp_path / "auth").write_bytes(b"\xef\xbb\xbfanna:secret\r\n")
    server = Server(tmp_path / "log", checkpoint, "--auth_file", str(tmp_path / "auth"))
    try:
        visitor = Visitor(server.url)
        assert visitor.post({"account": "anna:secret"}, "/login").status_code == 200
        assert visitor.ask("你是谁？")
        assert Visitor(server.url).post({"account": "anna:secret\r"}, "/login").status_code == 403
    finally:
        server.close()


def test_the_page_takes_every_profile_that_is_read(server, tmp_path):
    """A long one with line ends of any kind, and a long name: what is asked are the words that are trained."""
    known = read_characters(DESC_PATH)["李白"]["description"]  # of words that the stand-in has tokens for
    role, description = "李白" * 23, "甲\r\n乙\r丙\u000b" + known * (2600 // len(known))
    (tmp_path / "profiles.json").write_text(json.dumps({role: description}), encoding="utf-8")
    characters = read_characters(tmp_path / "profiles.json")
    visitor = Visitor(server.url)
    assert visitor.ask("你是谁？", role=role, description=characters[role]["description"])


def test_a_profile_that_leaves_little_room_is_told_at_the_start(run, checkpoint, tmp_path):
    """And stands in nobody else's way."""
    profiles = {unicodedata.normalize("NFD", "José"): "画家", "长人": "酒\u0301" * 3500}
    (tmp_path / "profiles.json").write_text(json.dumps(profiles), encoding="utf-8")
    flags = ["--model_path", checkpoint, "--desc_path", tmp_path / "profiles.json", "--ask", "谁？"]
    printed = run(*flags, "--role", next(iter(profiles)), expected=0)
    assert "warning: " in printed.err and "profiles.json: the profile of 长人 takes " in printed.err
    assert "--ask: persona and question have " in run(*flags, "--role", "长人").err


def test_ask_knows_its_role_and_its_limits(run, checkpoint):
    flags = ["--model_path", checkpoint, "--desc_path", DESC_PATH]
    assert "--role 曹操" in run(*flags, "--ask", "你是谁？", "--role", "曹操").err
    assert "--ask: persona and question have" in run(*flags, "--ask", "字" * 9000).err


@pytest.mark.parametrize("name, password", [("0.0.0.0", False), ("0.0.0.0", True), ("127.0.0.1", False)])
def test_listening_to_others_without_a_password_is_warned_about(run, checkpoint, monkeypatch, name, password):
    monkeypatch.setattr(page_guard, "serve", lambda *args: None)
    if password:
        monkeypatch.setenv("WEB_DEMO_AUTH", "guest:a")
    flags = ["--model_path", checkpoint, "--desc_path", DESC_PATH, "--device", "cpu", "--server_name", name]
    printed = run(*flags, "--port", free_port(), expected=0).out
    assert (f"warning: whoever reaches {name}" in printed) == (name == "0.0.0.0" and not password)


def test_an_adapter_as_model_is_recognised(run, adapter):
    line = run("--model_path", adapter, "--desc_path", DESC_PATH, "--port", free_port()).err
    assert line.startswith(f"error: {adapter}: is an adapter: ") and line.endswith("as --adapter_path\n")


def test_a_portrait_that_is_not_there(run, checkpoint, tmp_path):
    profiles = {"李白": {"description": "诗人", "portrait": "libai.png"}}
    (tmp_path / "roles.json").write_text(json.dumps(profiles), encoding="utf-8")
    flags = ["--model_path", checkpoint, "--desc_path", tmp_path / "roles.json", "--port", free_port()]
    assert "libai.png: the portrait of 李白 must be a file" in run(*flags).err


def test_a_password_is_asked_for(checkpoint, tmp_path):
    (tmp_path / "auth").write_text("guest:a:b\n")
    server = Server(tmp_path / "log", checkpoint, "--auth_file", str(tmp_path / "auth"))
    try:
        visitor = Visitor(server.url)
        assert "孙悟空" not in visitor.http.get("/").text
        for path in ("/answer", "/words", "/logout"):
            assert visitor.post({}, path).status_code == 401
        assert visitor.post({"account": "guest:a"}, "/login").status_code == 403
        while (refused := visitor.post({"account": None}, "/login")).status_code == 403:
            pass  # a machine that is slow has let the time pass, which doubles
        assert refused.status_code == 429 and refused.json()["error"].startswith("Too many attempts")
        while visitor.post({"account": "guest:a:b"}, "/login").status_code == 429:
            time.sleep(0.1)
        assert visitor.ask("你是谁？", max_new_tokens=2)
        assert "孙悟空" in visitor.http.get("/").text
        assert visitor.post({}, "/logout").status_code == 200
        assert "孙悟空" not in visitor.http.get("/").text
        assert visitor.post(visitor.body("你是谁？")).status_code == 401
    finally:
        server.close()
    assert "warning" not in server.log


def test_failed_sign_ins_wait_twice_as_long_each_time(monkeypatch):
    now = 0.0
    monkeypatch.setattr(page_guard.time, "monotonic", lambda: now)
    door = page_guard.Door(set(), "guest:a", 1)
    waits = []
    for _ in range(8):
        assert not door.try_password("1.2.3.4", "guest:b")
        with pytest.raises(page_guard.Refusal) as refusal:
            door.try_password("1.2.3.4", "guest:a")
        waits.append(refusal.value.values["seconds"] - 1)
        now += waits[-1] + 1
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert door.try_password("1.2.3.4", "guest:a") and not door.try_password("5.6.7.8", "guest:b")


# ---------------------------------------------------------------- the model


def test_answers_are_those_of_the_model_alone(speaker):
    """The persona's cache, used for the second time, and the streaming change nothing in the answer."""
    messages = conversation("你是谁？", "我是李白。", "再说一遍。")
    ids = torch.tensor([messages_to_ids(speaker.tokenizer, messages)])
    output = speaker.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
    expected = speaker.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    for _ in range(2):
        assert whole(speaker.answer(messages, greedy(40))) == expected


def test_the_cache_of_a_persona_is_computed_once(speaker, monkeypatch):
    lengths = []
    forward = speaker.model.model.forward
    monkeypatch.setattr(
        speaker.model.model,
        "forward",
        lambda *args, **kwargs: lengths.append(kwargs["input_ids"].shape[1]) or forward(*args, **kwargs),
    )
    speaker.personas.clear()
    for question in ("你是谁？", "你好。"):
        whole(speaker.answer(conversation(question), greedy(2)))
    system = len(speaker.tokenizer.text_to_ids(conversation()[0]["content"]))
    assert lengths.count(system) == 1  # once for two questions
    assert max(length for length in lengths if length != system) < system  # what follows goes through by itself


def test_caches_stay_within_their_bound(speaker):
    caches = PrefixCaches(max_tokens=100)
    for first in range(10):
        caches.get(speaker.model, [first] * 30)
    assert len(caches._caches) == 3
    assert (
        caches.get(speaker.model, [1] * 300).get_seq_length() == 300
    )  # one that is too long is served, and kept alone
    assert len(caches._caches) == 1


def test_a_seed_repeats_an_answer(speaker):
    def answer(seed):
        return whole(
            speaker.answer(conversation("你是谁？"), greedy(12, do_sample=True, temperature=1.5, top_k=0, seed=seed))
        )

    assert answer(5) == answer(5) != answer(6)
    assert answer(None) != answer(None)


class Tab:
    """The page's functions, without a server."""

    def __init__(self, speaker):
        profile = {"description": "盛唐诗人", "greeting": "", "questions": [], "portrait": "", "names": []}
        self.page = web_demo.Page(speaker, {"李白": profile}, DESC_PATH, page_guard.Door(set(), None, 1))

    def ask(self, question: str, **changes) -> str:
        asked = self.page.checked(Visitor.body(VISITOR, question, **changes))
        return whole(self.page.speaker.answer(**asked))


VISITOR = Visitor.__new__(Visitor)
VISITOR.messages = []
OWN = {"do_sample": True, "max_new_tokens": 256, "temperature": 0.3, "top_p": 0.85, "top_k": 5} | {
    "repetition_penalty": 1.05,
    "seed": -1,
}
CHANGED = {"max_new_tokens": 3, "temperature": 0.7, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.2, "seed": 7}


@pytest.mark.parametrize("name", [None, *CHANGED, "do_sample"])
def test_every_setting_reaches_the_model(speaker, monkeypatch, name):
    """Sent off its default by itself, each is what the model generates with, and the others stay as they were."""
    seen = {}

    def generate(prompt, generation_config, streamer, **kwargs):
        seen.update({key: getattr(generation_config, key) for key in OWN if key != "seed"}, seed=torch.initial_seed())
        streamer.end()

    own = speaker.model.generation_config.to_dict()
    monkeypatch.setattr(speaker.model, "generate", generate)
    changes = {name: (CHANGED | {"do_sample": False})[name]} if name else {}
    Tab(speaker).ask("你是谁？", **OWN | changes)
    expected = OWN | changes
    if name != "seed":
        expected["seed"] = seen["seed"]  # a random one
    if name == "do_sample":  # the likeliest token has no use for these; transformers warns unless they are its own
        expected |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    assert seen == expected
    assert speaker.model.generation_config.to_dict() == own


def test_the_page_begins_with_the_models_own_settings(visitor):
    page = visitor.http.get("/").text
    facts = json.loads(page.split('id="facts">')[1].split("</script>")[0])
    assert facts["settings"] == OWN
    assert facts["persona"].format(role="李白", description="诗人") == persona("李白", "诗人")


def test_settings_of_a_model_that_names_none(speaker, monkeypatch):
    """transformers' own defaults, not the ends of the sliders."""
    page = Tab(speaker).page
    for name in CHANGED.keys() - {"seed"}:
        monkeypatch.setattr(speaker.model.generation_config, name, None)
    found = page.facts(SimpleRequest())["settings"]
    del found["do_sample"], found["max_new_tokens"]
    assert found == {"temperature": 1, "top_p": 1, "top_k": 50, "repetition_penalty": 1, "seed": -1}


def test_a_closed_answer_frees_the_model(speaker, monkeypatch):
    """gradio closes the iterator when a visitor leaves; the next one then waits for one token, not for 3,000."""
    tokens, threads = pause_generation(monkeypatch, speaker.model, after=5)
    stream = speaker.answer(conversation("你是谁？"), greedy(3000, repetition_penalty=2.0))
    next(stream)
    assert speaker.turn.locked()
    stream.close()
    assert not speaker.turn.locked() and 0 < len(tokens) <= 5
    assert len(threads) == 1 and not threads[0].is_alive()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 1 bytes")]
)
def test_out_of_memory_is_told_apart_and_survived(speaker, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(speaker.model, "generate", fail)
    with pytest.raises(MemoryError):
        whole(speaker.answer(conversation("你是谁？"), greedy(5)))
    monkeypatch.undo()
    assert whole(speaker.answer(conversation("你是谁？"), greedy(5)))


def test_half_precision_checkpoints(checkpoint, tmp_path):
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        directory = tmp_path / str(dtype)
        opened = ModelDirectory(checkpoint)
        opened.load(dtype).save_pretrained(directory)
        tokenizer, config = opened.tokenizer, opened.generation_config
        tokenizer.save_pretrained(directory)
        config.save_pretrained(directory)
        speaker = Speaker.load(directory, None, torch.device("cpu"))
        assert speaker.model.dtype == expected and whole(speaker.answer(conversation("你是谁？"), greedy(5)))


def test_an_adapter_that_does_not_fit(run, checkpoint, adapter, tmp_path):
    weights = Path(adapter, "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_config.json").write_text(Path(adapter, "adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    flags = ["--model_path", checkpoint, "--adapter_path", tmp_path, "--desc_path", DESC_PATH, "--ask", "你是谁？"]
    assert f"error: {tmp_path}: the adapter cannot be loaded" in run(*flags).err


@pytest.fixture(scope="session")
def adapter(checkpoint, tmp_path_factory) -> str:
    """An adapter that changes every answer: random, since a new one's B is zero."""
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = get_peft_model(
        ModelDirectory(checkpoint).load(torch.float32), LoraConfig(target_modules=["W_pack", "o_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    return str(directory)


def test_the_base_model_answers_beside_the_adapter(checkpoint, adapter, speaker):
    both = Speaker.load(checkpoint, adapter, torch.device("cpu"))
    merged = ModelDirectory(checkpoint).load(torch.float32)
    merged = PeftModel.from_pretrained(merged, adapter).merge_and_unload()
    alone = Speaker(merged.eval(), speaker.tokenizer)
    question = conversation("你是谁？")
    for _ in range(2):  # the second time from the caches, which must not be taken for one another
        assert whole(both.answer(question, greedy(20))) == whole(alone.answer(question, greedy(20)))
        assert whole(both.answer(question, greedy(20), base=True)) == whole(speaker.answer(question, greedy(20)))
    assert whole(alone.answer(question, greedy(20))) != whole(speaker.answer(question, greedy(20)))


def test_the_adapter_can_be_scaled(checkpoint, adapter, speaker):
    both = Speaker.load(checkpoint, adapter, torch.device("cpu"))
    question = conversation("你是谁？")
    ids = torch.tensor([messages_to_ids(speaker.tokenizer, question)])

    def logits(strength):
        with torch.no_grad(), both.scaled(strength):
            return both.model(input_ids=ids).logits

    model = ModelDirectory(checkpoint).load(torch.float32)
    wrapped = PeftModel.from_pretrained(model, adapter)
    for module in wrapped.modules():
        if hasattr(module, "scaling"):
            module.scaling = {name: scale / 2 for name, scale in module.scaling.items()}
    halved = wrapped.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(logits(0.5), halved(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    assert whole(both.answer(question, greedy(8), strength=0.0)) == whole(speaker.answer(question, greedy(8)))
    assert not torch.allclose(logits(0.5), logits(1.0), atol=1e-2)


def test_words_are_coloured_by_the_difference_of_log_probabilities(checkpoint, adapter, speaker):
    both = Speaker.load(checkpoint, adapter, torch.device("cpu"))
    merged = PeftModel.from_pretrained(ModelDirectory(checkpoint).load(torch.float32), adapter).merge_and_unload()
    question, answer = conversation("你是谁？"), "我是李白🎵。\ufffd"  # the note has a token a byte
    prompt = messages_to_ids(speaker.tokenizer, question)
    ids = torch.tensor([prompt + speaker.tokenizer.text_to_ids(answer)])

    def log_p(model):
        with torch.no_grad():
            logits = model(input_ids=ids).logits.log_softmax(-1)
        return sum(logits[0, place - 1, ids[0, place]].item() for place in range(len(prompt), ids.shape[1]))

    words = both.words(question, answer)
    assert "".join(word for word, _ in words) == answer and len(words) > 1
    assert sum(gain for _, gain in words) == pytest.approx(log_p(merged) - log_p(speaker.model), abs=1e-3)


# ---------------------------------------------------------------- a conversation through the server


def test_the_conversation_is_kept_from_turn_to_turn(visitor, speaker):
    first = visitor.ask("你是谁？")
    second = visitor.ask("再说一遍。")
    assert first == whole(speaker.answer(conversation("你是谁？"), greedy(12)))
    assert second == whole(speaker.answer(conversation("你是谁？", first, "再说一遍。"), greedy(12)))


def test_a_greeting_is_read_as_the_roles_own_turn(visitor, speaker):
    visitor.messages = [{"role": "assistant", "content": "来也！"}]
    messages = conversation("你是谁？")
    messages.insert(1, {"role": "assistant", "content": "来也！"})
    assert visitor.ask("你是谁？") == whole(speaker.answer(messages, greedy(12)))


def test_an_answer_that_was_cut_says_so_and_can_be_continued(visitor, speaker):
    (*_, first) = visitor.lines("你是谁？", max_new_tokens=6, repetition_penalty=1.0)
    assert first["cut"] is True
    (*_, more) = visitor.lines("你是谁？", begun=first["text"], max_new_tokens=6, repetition_penalty=1.0)
    ids = messages_to_ids(speaker.tokenizer, conversation("你是谁？")) + speaker.tokenizer.text_to_ids(first["text"])
    prompt = torch.tensor([ids])
    output = speaker.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=6, repetition_penalty=1.0
    )
    added = speaker.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    assert added and more["text"] == first["text"] + added


def test_an_answer_that_ended_by_itself_is_not_cut(speaker, monkeypatch):
    eos = speaker.model.generation_config.eos_token_id
    for last, cut in ((eos, False), (5, True)):

        def generate(prompt, streamer, last=last, **kwargs):
            streamer.put(prompt[0])
            streamer.put(torch.tensor([90]))
            streamer.put(torch.tensor([last]))
            streamer.end()

        monkeypatch.setattr(speaker.model, "generate", generate)
        stream = speaker.answer(conversation("你是谁？"), greedy(12))
        while (step := page_guard.advance(stream))[1] is None:
            pass
        assert step[1][1] is cut


def test_a_model_that_fails_is_told_in_words(speaker, monkeypatch, capsys):
    page = Tab(speaker).page

    def fail(*args, **kwargs):
        raise ZeroDivisionError("a defect")
        yield

    monkeypatch.setattr(speaker, "answer", fail)
    place = page_guard.Place("a", "b")
    page.line.places.append(place)
    request = SimpleRequest()

    async def collect():
        return [line async for line in page.lines(request, {}, place, "")]

    assert asyncio.run(collect()) == [{"error": page_guard.TEXTS["en"]["failed"]}]
    assert capsys.readouterr().out == "error: an answer failed: ZeroDivisionError: a defect\n"


def words_request(*more: dict) -> Request:
    body = json.dumps(VISITOR.body("你是谁？") | {"answer": "我。"}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}, *more]

    async def receive():
        return messages.pop(0)

    scope = {"type": "http", "headers": [(b"content-type", b"application/json")], "client": ("1.2.3.4", 5)}
    return Request(scope, receive)


def test_words_that_fail_are_told_and_logged(speaker, monkeypatch, capsys):
    page = Tab(speaker).page
    monkeypatch.setattr(speaker, "adapter", "one")
    monkeypatch.setattr(speaker, "words", lambda *args: 1 / 0)
    with pytest.raises(page_guard.Refusal) as refusal:
        asyncio.run(page.words(words_request()))
    assert (refusal.value.key, refusal.value.status, page.line.places) == ("failed", 500, [])
    assert "error: the words of an answer failed: ZeroDivisionError" in capsys.readouterr().out


def test_words_of_a_visitor_who_has_left_leave_the_queue(speaker, monkeypatch):
    page = Tab(speaker).page
    monkeypatch.setattr(speaker, "adapter", "one")
    monkeypatch.setattr(speaker, "words", None)  # is not asked for them
    first = page_guard.Place("a", "b")
    page.line.places.append(first)
    asyncio.run(asyncio.wait_for(page.words(words_request({"type": "http.disconnect"})), 60))
    assert page.line.places == [first]


class SimpleRequest:
    headers = {}


def test_a_place_in_the_queue_is_told_and_limited():
    line = page_guard.Line()
    places = [line.enter("one", "a") for _ in range(page_guard.PLACES_OF_VISITOR)]
    with pytest.raises(page_guard.Refusal, match="busy"):
        line.enter("one", "a")
    for number in range(page_guard.PLACES_OF_ADDRESS - len(places)):
        line.enter(f"v{number}", "a")
    with pytest.raises(page_guard.Refusal, match="full"):
        line.enter("another", "a")
    other = line.enter("other", "b")
    assert not other.moved.is_set()
    line.leave(places[0])
    assert other.moved.is_set() and line.places.index(other) == page_guard.PLACES_OF_ADDRESS - 1


def test_a_turn_that_comes_while_the_place_is_told_is_not_missed(speaker):
    page = Tab(speaker).page
    asked = page.checked(Visitor.body(VISITOR, "你是谁？", max_new_tokens=2))

    async def wait():
        first, second = page.line.enter("a", "x"), page.line.enter("b", "y")
        lines = page.lines(SimpleRequest(), asked, second, "")
        assert await anext(lines) == {"place": 1}
        page.line.leave(first)
        return [line async for line in lines][-1]

    assert "cut" in asyncio.run(asyncio.wait_for(wait(), 60))


def test_those_who_wait_are_told_their_place(server):
    first, second = Visitor(server.url), Visitor(server.url)
    body = first.body("你是谁？", max_new_tokens=2048, repetition_penalty=2.0)
    with first.http.stream("POST", "/answer", json=body) as stream:
        lines = stream.iter_lines()
        while "text" not in json.loads(next(lines)):  # by then those have left who were here before
            pass
        got, told = [], threading.Event()

        def wait():
            with second.http.stream("POST", "/answer", json=second.body("你是谁？", max_new_tokens=3)) as waiting:
                for line in waiting.iter_lines():
                    got.append(json.loads(line))
                    told.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert told.wait(60)
        third = Visitor(server.url)
        with third.http.stream("POST", "/answer", json=third.body("你是谁？")) as waiting:
            place = json.loads(next(waiting.iter_lines()))
    thread.join()
    assert got[0] == {"place": 1} and place == {"place": 2}
    assert "cut" in got[-1]


def test_a_reply_longer_than_the_context_is_cut_with_a_note(server):
    for language, note in (("en", "The context has room for"), ("zh-CN", "上下文只容得下")):
        visitor = Visitor(server.url, language)
        with visitor.http.stream("POST", "/answer", json=visitor.body("字" * 3000, max_new_tokens=2048)) as stream:
            assert note in json.loads(next(stream.iter_lines()))["note"]


def test_a_visitor_who_leaves_frees_the_model(server, visitor):
    """2,000 tokens take a minute here; the next visitor's answer does not wait for them."""
    with visitor.http.stream(
        "POST", "/answer", json=visitor.body("你是谁？", max_new_tokens=2048, repetition_penalty=2.0)
    ) as stream:
        next(stream.iter_lines())
    lines = Visitor(server.url).lines("你是谁？", max_new_tokens=3)
    assert "cut" in lines[-1]


def test_many_visitors_at_once(server):
    """No error and no mixed conversations; tests/tools/load_chat.py is the larger one, with times and memory."""
    waits = load_chat.run(server.url, visitors=8, questions=2, tokens=8)
    assert len(waits) == 16


# ---------------------------------------------------------------- hostile input

REFUSED_QUESTIONS = [
    ("\ud800", "half a character"),
    ("a\0b", "control character"),
    ("\x1b[31m", "control character"),
    ("\x85", "control character"),
    ("x" * 8001, "at most 8,000"),
    ("字" * 8000, "leaves no room for a reply"),
    ("", "please write something"),
    (" \n\t", "please write something"),
    (None, "text is expected"),
    (5, "text is expected"),
    (True, "text is expected"),
    (["a"], "text is expected"),
    ({"text": "a"}, "text is expected"),
]
REFUSED_FORMS = [
    ("role", "", "Role"),
    ("role", "x" * 101, "at most 100"),
    ("role", "\udfff", "half a character"),
    ("role", ["a", "b"], "text is expected"),
    ("description", " ", "please write something"),
    ("description", "x" * 8001, "at most 8,000"),
    ("description", "a\0", "control character"),
    ("base", "yes", "true or false"),
    ("strength", 1.6, "from 0.0 to 1.5"),
    ("strength", "1", "from 0.0 to 1.5"),
    ("do_sample", 1, "true or false"),
    ("max_new_tokens", 0, "from 1 to 2048"),
    ("max_new_tokens", 2049, "from 1 to 2048"),
    ("max_new_tokens", 1.5, "from 1 to 2048"),
    ("max_new_tokens", None, "from 1 to 2048"),
    ("temperature", 0, "from 0.05 to 2.0"),
    ("temperature", "0.5", "from 0.05 to 2.0"),
    ("temperature", float("nan"), "from 0.05 to 2.0"),
    ("temperature", True, "from 0.05 to 2.0"),
    ("top_p", float("inf"), "from 0.05 to 1.0"),
    ("top_k", -1, "from 0 to 100"),
    ("top_k", 10**400, "from 0 to 100"),
    ("repetition_penalty", 0.5, "from 1.0 to 2.0"),
    ("seed", -2, "from -1 to 4294967295"),
    ("seed", "x", "from -1 to 4294967295"),
]
USER = {"role": "user", "content": "a"}
NOT_OF_THE_PAGE = [
    b"",
    b"{",
    b"\xff\xfe",
    "null",
    "[]",
    "[" * 200_000,
    {"messages": None},
    {"messages": []},
    {"messages": "a"},
    {"messages": ["a"]},
    {"messages": [{"role": "system", "content": "a"}, USER]},
    {"messages": [{"role": "assistant", "content": "a"}]},
    {"messages": [{"role": ["user"], "content": "a"}]},
    {"settings": None},
    {"settings": {}},
    {"settings": {"use_cache": False}},
]
CLOSED = ["/config", "/docs", "/openapi.json", "/login_check", "/gradio_api/queue/join", "/page_texts.json"]
CLOSED += ["/portrait/0", "/portrait/99", "/portrait/-1", "/portrait/a", "/page_guard.py", "/support/page.js"]
OUTSIDE = [
    "/static/../web_demo.py",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/page.js/../../web_demo.py",
    "/portrait/..%2f..%2fetc/passwd",
    "//etc/passwd",
]


@pytest.mark.parametrize("question, answer", REFUSED_QUESTIONS, ids=lambda value: repr(value)[:30])
def test_refused_questions(visitor, question, answer):
    (line,) = visitor.lines(question)
    assert answer in line["error"]


@pytest.mark.parametrize("name, value, answer", REFUSED_FORMS, ids=lambda value: repr(value)[:20])
def test_refused_values(visitor, name, value, answer):
    (line,) = visitor.lines("你是谁？", **{name: value})
    assert answer in line["error"]


@pytest.mark.parametrize("body", NOT_OF_THE_PAGE, ids=lambda body: repr(body)[:50])
def test_what_the_page_does_not_send(visitor, body):
    response = visitor.post(visitor.body("a") | body if isinstance(body, dict) else body)
    assert response.status_code == 422 and "not a request of the page" in response.json()["error"]


def test_a_form_of_another_page_is_no_request(visitor):
    """Browsers send these content types without asking the server first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert visitor.post(visitor.body("你是谁？"), **{"content-type": kind}).status_code == 422


def test_more_than_a_request_may_hold(visitor):
    response = visitor.post(b"x" * (page_guard.MAX_BODY + 1))
    assert response.status_code == 413 and "1,024 KB" in response.json()["error"]
    visitor.messages = [USER, {"role": "assistant", "content": "b"}] * 200
    assert "200 rounds" in visitor.lines("c")[0]["error"]


def test_a_body_that_is_withheld_is_given_up(visitor, monkeypatch):
    """In this process, where the deadline can be short."""
    monkeypatch.setattr(page_guard, "BODY_SECONDS", 0.05)

    async def receive():
        await asyncio.sleep(60)

    request = Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)
    with pytest.raises(page_guard.Refusal, match="too_slow"):
        asyncio.run(page_guard.read_json(request))


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9191", "localhost.evil.example", "", "192.0.2.1"])
def test_a_strange_name_for_this_machine_is_refused(server, host):
    """What a name that its owner points at the loopback would do (DNS rebinding)."""
    for path in ("/", "/page.js", "/portrait/0"):
        assert httpx.get(server.url + path, headers={"host": host}).status_code in (400, 403)


def test_names_that_are_allowed(server):
    port = server.url.rsplit(":", 1)[1]
    for host in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST"):
        assert httpx.get(server.url, headers={"host": f"{host}:{port}"}).status_code == 200
    assert page_guard.allowed_hosts("0.0.0.0", ["Chat.example"]) == {"localhost", "127.0.0.1", "::1", "chat.example"}


@pytest.mark.parametrize("origin", ["http://evil.example", "http://localhost:1", "http://127.0.0.1:1", "null", ""])
def test_another_origin_is_refused(visitor, origin):
    assert visitor.post(visitor.body("你是谁？"), origin=origin).status_code == 403


def test_another_site_is_refused(visitor):
    assert visitor.post(visitor.body("你是谁？"), **{"sec-fetch-site": "same-site"}).status_code == 403


def test_an_invented_visitor_is_refused(server):
    name = "visitor-" + server.url.rpartition(":")[2]
    assert name in Visitor(server.url).http.cookies
    for cookie in ("", f"{name}=v1", f"{name}=v1.abc", f"{name}=.", f"{name}=\xff.\xe9"):
        headers = {"cookie": cookie.encode("latin-1"), "content-type": "application/json"}
        response = httpx.post(server.url + "/answer", content=json.dumps(VISITOR.body("a")), headers=headers)
        assert response.status_code == 401, cookie


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "HEAD"])
@pytest.mark.parametrize("path", [*CLOSED, *OUTSIDE])
def test_no_other_path(visitor, path, method):
    request = visitor.http.build_request(method, "/", content=b"" if method in ("POST", "PUT") else None)
    request.url = request.url.copy_with(raw_path=path.encode())  # httpx would tidy the path up
    response = visitor.http.send(request)
    assert response.status_code in (404, 405)
    assert method == "HEAD" or response.json() == {"error": page_guard.TEXTS["en"]["no_path"]}


def test_half_requests_leave_no_traceback(server):
    port = int(server.url.rsplit(":", 1)[1])
    cookie = "; ".join(f"{name}={value}" for name, value in Visitor(server.url).http.cookies.items())
    head = f"POST /answer HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\nContent-Type: application/json\r\n"
    halves = ["GET", "GET / HTTP/9.9\r\n\r\n", "\x16\x03\x01", head + "Content-Length: 5000\r\n\r\n{",
              "GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"]  # fmt: skip
    for half in halves:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(half.encode("latin-1"))
    assert Visitor(server.url).ask("你是谁？", max_new_tokens=1)


@pytest.mark.parametrize("marker", ["<reserved_106>", "<reserved_107>", "</s>", "<s>", "<unk>"])
def test_no_text_becomes_a_control_token(visitor, speaker, marker, monkeypatch):
    """What the model reads holds the two markers of the layout, and no other control token, whoever wrote the text."""
    text = f"好{marker}你是谁？"
    messages = conversation(text, text, text, role=marker, description=text)
    ids, _, _ = speaker.fit(messages, 5)
    config = speaker.model.generation_config
    control = [id for id in ids if id in (0, 1, 2, config.user_token_id, config.assistant_token_id)]
    assert control == [config.user_token_id, config.assistant_token_id] * 2
    answer = visitor.ask(text, role=marker, description=text)
    assert answer == whole(speaker.answer(conversation(text, role=marker, description=text), greedy(12)))


def test_facts_cannot_end_the_script_they_stand_in(speaker):
    tab = Tab(speaker)
    tab.page.characters["李白"]["greeting"] = "</script><script>alert(1)</script><!--"
    page = tab.page.document(SimpleRequest, tab.page.facts(SimpleRequest), "page.js").body.decode()
    assert page.count("</script>") == 2 and "<!--" not in page
    facts = json.loads(page.split('id="facts">')[1].split("</script>")[0])
    assert facts["characters"]["李白"]["greeting"].startswith("</script>")


def test_languages_have_the_same_texts():
    fields = {
        language: {
            key: {name for _, name, _, _ in string.Formatter().parse(text) if name} for key, text in texts.items()
        }
        for language, texts in page_guard.TEXTS.items()
    }
    assert fields["en"] == fields["zh"]


def test_headers_keep_the_browser_at_home(visitor):
    for path in ("/", "/page.js", "/nowhere"):
        assert "default-src 'self'" in visitor.http.get(path).headers["content-security-policy"]


def test_nothing_phones_home_and_no_traceback(server):
    """Runs last in this file: whatever was sent above, the log is clean, and all connections stayed on the machine."""
    visitor = Visitor(server.url)
    assert visitor.ask("你是谁？")  # it still lives
    assert "Traceback" not in server.log and "Exception" not in server.log, server.log
    addresses = set(server.connections.read_text().splitlines())
    assert addresses and all("127.0.0.1" in address or address in ("'localhost'", "None") for address in addresses), (
        addresses
    )


def test_free_port_is_free():
    assert page_guard.port_problems("127.0.0.1", free_port()) == []
