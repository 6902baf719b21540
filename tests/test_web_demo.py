"""The chat page without a browser: its arguments, what it answers, and what it says to everything it should not answer."""

import json
import os
import string
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import gradio as gr
import httpx
import load_chat
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_tokenizer import pause_generation
from web_client import DESC_PATH, FORM, Server, Visitor, free_port

import web_demo
from baichuan.generation_utils import messages_to_ids
from data_helper import persona, read_profiles
from support import page_guard
from support.model_directory import ModelDirectory
from support.speaker import PrefixCaches, Speaker

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
    flags = ["--model_path", tmp_path / "empty", "--adapter_path", tmp_path, "--desc_path", tmp_path / "roles.json"]
    result = run(*flags, "--device", "7", "--auth", "nobody", "--server_name", "203.0.113.1")
    lines = result.err.splitlines()
    assert result.out == ""
    assert all(line.startswith("error: ") for line in lines)
    for words in ("has no weights", "adapter_config.json", "roles.json:2:", "--device 7", "--auth", "203.0.113.1:9090"):
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
    description = read_profiles(DESC_PATH)["张飞"]
    expected = conversation("你是谁？", role="张飞", description=description)
    settings = greedy(speaker.model.generation_config.max_new_tokens)
    assert answer.rstrip("\n") == whole(speaker.answer(expected, settings)).rstrip("\n")


def test_ask_knows_its_role_and_its_limits(run, checkpoint):
    flags = ["--model_path", checkpoint, "--desc_path", DESC_PATH]
    assert "--role 曹操" in run(*flags, "--ask", "你是谁？", "--role", "曹操").err
    assert "--ask: persona and question have" in run(*flags, "--ask", "字" * 9000).err


@pytest.mark.parametrize("name, auth", [("0.0.0.0", None), ("0.0.0.0", "guest:a"), ("127.0.0.1", None)])
def test_listening_to_others_without_a_password_is_warned_about(run, checkpoint, monkeypatch, name, auth):
    page = MagicMock()
    monkeypatch.setattr(web_demo.Page, "build", lambda self: page)
    flags = ["--model_path", checkpoint, "--desc_path", DESC_PATH, "--device", "cpu", "--server_name", name]
    flags += ["--port", free_port(), *(["--auth", auth] if auth else [])]
    printed = run(*flags, expected=0).out
    assert (f"warning: whoever reaches {name}" in printed) == (name == "0.0.0.0" and auth is None)
    launched = page.queue.return_value.launch.call_args.kwargs
    assert launched["server_name"] == name and launched["auth"] == (("guest", "a") if auth else None)


def test_a_password_is_asked_for(checkpoint, tmp_path):
    server = Server(tmp_path / "log", checkpoint, "--auth", "guest:a:b")
    try:
        http = httpx.Client(base_url=server.url)
        for path in ("/config", "/gradio_api/queue/data?session_hash=a"):
            assert http.get(path).status_code in (401, 404)
        call = {"fn_index": 0, "data": [None, "你是谁？", *FORM.values()], "session_hash": "a"}
        assert http.post("/gradio_api/queue/join", json=call).status_code == 401
        assert http.post("/login", data={"username": "guest", "password": "a"}).status_code == 400
        assert http.post("/login", data={"username": "guest", "password": "a:b"}).status_code == 200
        assert http.get("/config").status_code == 200
    finally:
        server.close()
    assert "warning" not in server.log


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
    """A conversation on the page, without gradio and a server between the two."""

    request = SimpleNamespace(headers={})

    def __init__(self, speaker):
        self.page = web_demo.Page(speaker, {"李白": "盛唐诗人"}, {"李白": []})
        self.conversation = web_demo.Conversation()

    def ask(self, question: str, **changes) -> dict:
        """The round of this question, once it is answered."""
        self.page.ask(self.request, self.conversation, question, *(FORM | changes).values())
        for _ in self.page.answer(self.request, self.conversation):
            pass
        return self.conversation.rounds[-1]


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


def test_every_control_of_the_page_is_what_it_says(speaker):
    """In the order of FORM, which the functions take, under its own label, and at first as generation_config.json has it."""
    demo = Tab(speaker).page.build()
    functions = [function for function in demo.fns.values() if function.name in ("ask", "ask_example", "retry", "edit")]
    assert len(functions) == 4
    for function in functions:
        form = function.inputs[-len(FORM) :]
        assert [str(component.label) for component in form] == [str(gr.I18n()(name)) for name in FORM]
        assert {name: component.value for name, component in zip(FORM, form) if name in OWN} == OWN


def test_a_closed_answer_frees_the_model(speaker, monkeypatch):
    """gradio closes the iterator when a visitor leaves; the next one then waits for one token, not for 3,000."""
    tokens, threads = pause_generation(monkeypatch, speaker.model, after=5)
    stream = speaker.answer(conversation("你是谁？"), greedy(3000, repetition_penalty=2.0))
    next(stream)
    assert speaker.turn.locked()
    stream.close()
    assert not speaker.turn.locked() and 0 < len(tokens) <= 5
    assert len(threads) == 1 and not threads[0].is_alive()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory: 1 bytes")])
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


def test_each_column_continues_its_own_answers(speaker, monkeypatch):
    """Where the base model has not answered, it reads the other's answer; otherwise nothing of the other's."""
    both, read = Speaker(speaker.model, speaker.tokenizer, adapter=MagicMock()), []

    def answer(messages, settings, base=False):
        read.append(("base" if base else "tuned", messages))
        yield f"{read[-1][0]} {len(messages) // 2}"

    monkeypatch.setattr(both, "answer", answer)
    tab = Tab(both)
    tab.ask("一？")
    tab.ask("二？", compare=True)
    tab.ask("三？", compare=True)
    assert read == [
        ("tuned", conversation("一？")),
        ("tuned", conversation("一？", "tuned 1", "二？")),
        ("base", conversation("一？", "tuned 1", "二？")),
        ("tuned", conversation("一？", "tuned 1", "二？", "tuned 2", "三？")),
        ("base", conversation("一？", "tuned 1", "二？", "base 2", "三？")),
    ]
    answers = [(past["response"], past["base"]) for past in tab.conversation.rounds]
    assert answers == [("tuned 1", ""), ("tuned 2", "base 2"), ("tuned 3", "base 3")]


# ---------------------------------------------------------------- a conversation through the server


def test_the_conversation_is_kept_from_turn_to_turn(visitor, speaker):
    first = visitor.ask("你是谁？")
    second = visitor.ask("再说一遍。")
    assert first == whole(speaker.answer(conversation("你是谁？"), greedy(12)))
    assert second == whole(speaker.answer(conversation("你是谁？", first, "再说一遍。"), greedy(12)))
    assert visitor.shown(visitor.put(question=["好。"]))[:4] == ["你是谁？", first, "再说一遍。", second]


def test_nobody_sees_another_ones_conversation(server, speaker):
    one, other = Visitor(server.url), Visitor(server.url)
    one.ask("你是谁？")
    assert other.ask("再说一遍。") == whole(speaker.answer(conversation("再说一遍。"), greedy(12)))
    assert other.call("download", None)["data"][0].count("\n") == 1


def test_download_is_training_data(visitor):
    answers = [visitor.ask(question) for question in ("你是谁？", '"</s>"\n<b>')]
    visitor.put(question=["没有等到回答"])
    lines = [json.loads(line) for line in visitor.call("download", None)["data"][0].splitlines()]
    system = persona(FORM["role"], FORM["description"])
    prompts = ("你是谁？", '"</s>"\n<b>')
    assert lines == [
        {"role": "李白", "system": system, "prompt": prompt, "response": answer}
        for prompt, answer in zip(prompts, answers)
    ]


def test_another_role_starts_a_fresh_conversation(visitor, speaker):
    visitor.ask("你是谁？")
    changed = visitor.call("change_role", None, "张飞")["data"]
    assert changed[1]["value"] == [] and "new conversation" in changed[3]
    assert changed[5] == read_profiles(DESC_PATH)["张飞"]
    assert len(changed[1]["examples"]) == 4
    visitor.ask("你是谁？")
    answer = visitor.ask("再说一遍。", role="曹操", description="枭雄")  # a client that skips the event
    assert answer == whole(speaker.answer(conversation("再说一遍。", role="曹操", description="枭雄"), greedy(12)))


def test_retry_edit_undo_clear(visitor, speaker):
    sampled = {"do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 1.0, "seed": 7}
    first = visitor.ask("你是谁？", **sampled)
    visitor.put("retry", event={"index": 0, "value": "你是谁？"}, **sampled)
    second = visitor.shown(visitor.call("answer", None))
    assert second[0] == "你是谁？" and second[1] != first  # with a seed too, another attempt is another answer
    assert "same question gets the same answer" in visitor.put("retry", event={"index": 0})["data"][3]
    visitor.call("answer", None)
    visitor.put("edit", event={"index": 0, "previous_value": "你是谁？", "value": "你好。"})
    edited = visitor.shown(visitor.call("answer", None))
    assert edited == ["你好。", whole(speaker.answer(conversation("你好。"), greedy(12)))]
    undone = visitor.call("undo", None, event={"index": 0, "value": "你好。"})["data"]
    assert undone[1] == [] and undone[4] == "你好。"
    visitor.ask("你是谁？")
    assert visitor.call("clear", None)["data"][1] == []
    assert visitor.ask("再说一遍。") == whole(speaker.answer(conversation("再说一遍。"), greedy(12)))


def test_a_question_while_an_answer_is_written(visitor):
    visitor.put(question=["你是谁？"])
    assert "stop it first" in visitor.put(question=["再说一遍。"])["error"]
    visitor.call("stop", None)
    assert visitor.shown(visitor.put(question=["再说一遍。"])) == ["再说一遍。"]  # the unanswered one is gone


def test_a_reply_longer_than_the_context_is_cut_with_a_note(visitor):
    question = "字" * 3000
    asked = visitor.put(question=[question], max_new_tokens=2048)
    assert "The context has room for" in asked["data"][3]
    assert (
        "上下文只容得下"
        in Visitor(visitor.http.base_url, "zh-CN").put(question=[question], max_new_tokens=2048)["data"][3]
    )


def test_a_visitor_who_leaves_frees_the_model(server, visitor):
    """3,000 tokens take a minute here; the next visitor's answer does not wait for them."""
    visitor.put(question=["你是谁？"], max_new_tokens=2048, repetition_penalty=2.0)
    visitor.join("answer", None)
    for message in visitor.messages():
        if message["msg"] == "process_generating":
            break  # and out of the `with`, which closes the connection
    other = Visitor(server.url)
    assert other.ask("你是谁？", max_new_tokens=3)
    lines = visitor.call("download", None)["data"][0]
    assert len(visitor.http.get("/config").json()) and len(json.loads(lines)["response"]) < 1500


def test_many_visitors_at_once(server):
    """No error and no mixed conversations; tests/tools/load_chat.py is the larger one, with times and memory."""
    waits = load_chat.run(server.url, visitors=8, questions=2, tokens=8)
    assert len(waits) == 16


# ---------------------------------------------------------------- hostile input

FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
REFUSED_QUESTIONS = [
    ("\ud800", "half a character"),
    ("a\0b", "control character"),
    ("\x1b[31m", "control character"),
    ("\x85", "control character"),
    ("x" * 1_000_000, "at most 8,000"),
    ("字" * 8000, "leaves no room for a reply"),
    ("", "please write something"),
    (" \n\t", "please write something"),
    (None, "text is expected"),
    (5, "text is expected"),
    (True, "text is expected"),
    (["a"], "not a request of the page"),
    (FILE, "not a request of the page"),
    ({"text": "a", "files": [FILE]}, "not a request of the page"),
    ([{"role": "user", "content": [{"file": FILE, "type": "file"}]}], "not a request of the page"),
]
REFUSED_FORMS = [
    ("role", "", "Role"),
    ("role", "x" * 41, "at most 40"),
    ("role", "\udfff", "half a character"),
    ("role", ["a", "b"], "not a request of the page"),
    ("description", " ", "please write something"),
    ("description", "x" * 2001, "at most 2,000"),
    ("description", "a\0", "control character"),
    ("compare", "yes", "true or false"),
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
ROUNDLESS = [None, {}, 5, "index", {"index": None}, {"index": "0"}, {"index": 99}, {"index": -2}, {"index": [0, 1]}]
NOT_OF_THE_PAGE = [
    b"",
    b"{",
    b"\xff\xfe",
    "null",
    "[]",
    "[" * 200_000,
    '{"data": [null]}',
    '{"fn_index": 999, "data": [null], "session_hash": "a"}',
    '{"fn_index": "ask", "data": [null], "session_hash": "a"}',
    '{"fn_index": [0], "data": [null], "session_hash": "a"}',
    '{"fn_index": 0, "data": [null, "a"], "session_hash": "a"}',
    '{"fn_index": 0, "data": {"a": 1}, "session_hash": "a"}',
    '{"fn_index": 1, "data": [null]}',
    '{"fn_index": 1, "data": [null], "session_hash": 5}',
    '{"fn_index": 1, "data": [null], "session_hash": "../../etc"}',
    '{"fn_index": 1, "data": [null], "session_hash": "\\ud800"}',
]
CLOSED = [
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=web_demo.py",
    "/gradio_api/file=../../etc/passwd",
    "/gradio_api/file/etc/passwd",
    "/gradio_api/proxy=http://127.0.0.1:22/",
    "/gradio_api/stream/a/b/1/playlist.m3u8",
    "/gradio_api/upload",
    "/gradio_api/upload_progress?upload_id=a",
    "/gradio_api/component_server",
    "/gradio_api/custom_component/a/b/c/style.css",
    "/gradio_api/call/ask",
    "/gradio_api/run/ask",
    "/gradio_api/api/ask",
    "/gradio_api/info",
    "/gradio_api/openapi.json",
    "/gradio_api/runs",
    "/gradio_api/mcp/",
    "/gradio_api/dev/reload",
    "/monitoring",
    "/docs",
    "/openapi.json",
]
OUTSIDE = [  # of what gradio itself serves; it looks for such paths, and so do we here
    "/static/../web_demo.py",
    "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/static/..%2f..%2f..%2fetc/passwd",
    "/assets//etc/passwd",
    "/assets/..\\..\\web_demo.py",
    "/svelte/%2e%2e/%2e%2e/etc/passwd",
]


@pytest.mark.parametrize("question, answer", REFUSED_QUESTIONS, ids=lambda value: repr(value)[:30])
def test_refused_questions(visitor, question, answer):
    assert answer in visitor.put(question=[question])["error"]


@pytest.mark.parametrize("name, value, answer", REFUSED_FORMS, ids=lambda value: repr(value)[:20])
def test_refused_values(visitor, name, value, answer):
    assert answer in visitor.put(question=["你是谁？"], **{name: value})["error"]


@pytest.mark.parametrize("event", ROUNDLESS, ids=repr)
def test_events_about_no_message(visitor, event):
    visitor.ask("你是谁？", max_new_tokens=1)
    for function in ("retry", "edit"):
        assert "no such message" in visitor.put(function, event=event)["error"]
    assert "no such message" in visitor.call("undo", None, event=event)["error"]


def test_events_with_a_wrong_text(visitor):
    visitor.ask("你是谁？", max_new_tokens=1)
    for event in ({"index": 0, "value": FILE}, {"index": 0, "value": [[FILE]]}, FILE):
        assert "not a request of the page" in visitor.put("edit", event=event)["error"]
    for value in (None, ["a"], {"text": "a"}):
        assert "text is expected" in visitor.put("edit", event={"index": 0, "value": value})["error"]
    for value in (None, "a", ["a"], {"text": 5}, {"files": []}):
        assert "text is expected" in visitor.put("ask_example", event={"value": value})["error"]
    assert "text is expected" in visitor.call("change_role", None, 5)["error"]
    assert "no such message" in visitor.call("answer", None)["error"]  # nothing has been asked


@pytest.mark.parametrize("body", NOT_OF_THE_PAGE, ids=lambda body: repr(body[:50]))
def test_what_the_page_does_not_send(visitor, body):
    response = visitor.post(body)
    assert response.status_code == 422 and "not a request of the page" in response.json()["error"]


def test_more_than_a_request_may_hold(visitor):
    response = visitor.post(b"x" * (page_guard.MAX_BODY + 1))
    assert response.status_code == 413 and "at most 8,000" in response.json()["error"]
    assert "字" in Visitor(visitor.http.base_url, "zh").post(b"x" * (page_guard.MAX_BODY + 1)).json()["error"]


@pytest.fixture(scope="module")
def strange_request(server):
    with httpx.Client(base_url=server.url, headers={"accept-language": "zh"}) as http:

        def send(method: str, path: str) -> httpx.Response:
            request = http.build_request(method, path, content=b"" if method in ("POST", "PUT") else None)
            request.url = request.url.copy_with(raw_path=path.encode())  # httpx would tidy the path up
            return http.send(request)

        yield send


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "HEAD"])
@pytest.mark.parametrize("path", CLOSED)
def test_closed_paths_end_at_the_gate(strange_request, path, method):
    """The words are the page's own: gradio, which would answer some of these with a file and others with its 403, is not asked."""
    response = strange_request(method, path)
    assert response.status_code == 404
    message = page_guard.TEXTS["zh"]["no_path"]
    assert method == "HEAD" or response.json() == {"error": message, "detail": message}


def test_messages_of_a_strange_session_end_at_the_gate(strange_request):
    response = strange_request("GET", "/gradio_api/queue/data?session_hash=stranger")
    assert response.status_code == 404 and response.json()["error"] == page_guard.TEXTS["zh"]["no_call"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_no_file_outside_what_the_page_is_made_of(strange_request, path):
    for method in ("GET", "POST", "PUT", "HEAD"):
        response = strange_request(method, path)
        assert response.status_code in (403, 404, 405), (method, response.status_code)
        assert "root:" not in response.text and "argparse" not in response.text


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


@pytest.mark.parametrize(
    "text", ["<script>x</script>", "<img src=x>", "&lt;b&gt;", "<!-- x", "</div>", "a < b & c", "<中>"]
)
def test_shown_text_is_no_html(text):
    parser = HTMLParser(convert_charrefs=True)
    found = []
    parser.handle_starttag = lambda tag, attributes: found.append(tag)
    parser.handle_endtag = parser.handle_comment = parser.handle_decl = found.append
    seen = []
    parser.handle_data = seen.append
    parser.feed(page_guard.literal(text))
    parser.close()
    assert found == [] and "".join(seen).replace(page_guard.JOINER, "") == text


def test_languages_have_the_same_texts():
    fields = {
        language: {
            key: {name for _, name, _, _ in string.Formatter().parse(text) if name} for key, text in texts.items()
        }
        for language, texts in page_guard.TEXTS.items()
    }
    assert fields["en"] == fields["zh"]


def test_headers_keep_the_browser_at_home(visitor):
    for path in ("/", "/config", "/nowhere"):
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
