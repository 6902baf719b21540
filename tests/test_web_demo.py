"""The chat page without a browser: its arguments, its model, what a browser keeps, and who may call it."""

import asyncio
import html
import json
import os
import socket
import string
from contextlib import nullcontext
from pathlib import Path
from urllib.request import urlopen

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from test_tokenization_baichuan import pause_generation
from web_client import DESC_PATH, Server, free_port

import web_demo
from baichuan.generation_utils import messages_to_ids
from data_helper import persona
from support.dialogues.profiles import read_characters
from support.model.directory import ModelDirectory
from support.page import chats, hosts, look
from support.page.speaker import PrefixCaches, Speaker
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
PROFILES = read_characters(DESC_PATH)


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("server")
    environment = dict(os.environ, WATCH=str(directory / "connections"))
    yield (server := Server(directory / "log", checkpoint, program=("-c", WATCHED), env=environment))
    server.close()


@pytest.fixture(scope="module")
def speaker(checkpoint):
    return Speaker.load(checkpoint, None, torch.device("cpu"))


@pytest.fixture(scope="session")
def adapter(checkpoint, tmp_path_factory) -> str:
    """An adapter that changes every answer: random, since a new one's B is zero."""
    directory, lora = tmp_path_factory.mktemp("adapter"), LoraConfig(target_modules=["W_pack", "o_proj"])
    torch.manual_seed(0)
    model = get_peft_model(ModelDirectory(checkpoint).load(torch.float32), lora)
    for parameter in (parameter for name, parameter in model.named_parameters() if "lora_B" in name):
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    return str(directory)


def conversation(*turns: str, role="李白", description="盛唐诗人") -> list[dict]:
    turns = [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return [{"role": "system", "content": persona(role, description)}, *turns]


def greedy(max_new_tokens: int, **changes) -> dict:
    return {"do_sample": False, "max_new_tokens": max_new_tokens, "repetition_penalty": 1.05, "seed": -1} | changes


def whole(answer) -> str:
    """The last text of a Speaker's (text, state) pairs."""
    return "".join(text for text, _ in list(answer)[-1:])


ASKED = conversation("你是谁？")

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


def test_an_adapter_that_is_no_model_or_does_not_fit(run, adapter, tmp_path):
    told = run("--model_path", adapter, "--ask", "你是谁？")
    assert told.startswith(f"error: {adapter}: is an adapter: ") and told.endswith("as --adapter_path\n")
    for name, kept in (("adapter_config.json", None), ("adapter_model.safetensors", 9999)):
        (tmp_path / name).write_bytes(Path(adapter, name).read_bytes()[:kept])
    assert f"error: {tmp_path}: the adapter cannot be loaded" in run("--adapter_path", tmp_path, "--ask", "你是谁？")


# ---------------------------------------------------------------- the model


def test_answers_are_those_of_the_model_alone(speaker):
    """The persona's cache, used for the second time, the streaming, and a beginning that is given change nothing."""
    messages, begun = conversation("你是谁？", "我是李白。", "再说一遍。"), ""
    for _ in range(2):
        ids = messages_to_ids(speaker.tokenizer, messages) + speaker.tokenizer.text_to_ids(begun)
        options = {"do_sample": False, "max_new_tokens": 20, "repetition_penalty": 1.0}
        output = speaker.model.generate(prompt := torch.tensor([ids]), attention_mask=prompt**0, **options)
        expected = begun + speaker.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        *growing, last = speaker.answer(messages, greedy(20, repetition_penalty=1.0), begun=begun)
        assert last == (expected, "cut") and {state for _, state in growing} == {"stopped"} and expected > begun
        begun = expected


def test_an_answer_that_ended_by_itself_is_done(speaker, monkeypatch):
    for last, state in ((speaker.own_settings.eos_token_id, "done"), (5, "cut")):

        def generate(prompt, streamer, last=last, **kwargs):
            for ids in (prompt[0], torch.tensor([90]), torch.tensor([last])):
                streamer.put(ids)
            streamer.end()

        monkeypatch.setattr(speaker.model, "generate", generate)
        assert list(speaker.answer(ASKED, greedy(12)))[-1][1] == state


def test_the_cache_of_a_persona_is_computed_once(speaker, monkeypatch):
    lengths, forward = [], speaker.model.model.forward
    spy = lambda **kwargs: lengths.append(kwargs["input_ids"].shape[1]) or forward(**kwargs)  # noqa: E731
    monkeypatch.setattr(speaker.model.model, "forward", spy)
    speaker.personas.clear()
    for question in ("你是谁？", "你好。"):
        whole(speaker.answer(conversation(question), greedy(2)))
    system = len(speaker.tokenizer.text_to_ids(ASKED[0]["content"]))
    assert sorted(lengths)[-1] == system > sorted(lengths)[-2]  # once for two questions; what follows goes by itself
    caches = PrefixCaches(max_tokens=100)
    for ids, count in ([[1] * 30, 1], [[2] * 30, 2], [[3] * 30, 3], [[4] * 30, 3], [[5] * 300, 1]):
        assert caches.get(speaker.model, ids).get_seq_length() == len(ids) and len(caches._caches) == count


def test_a_seed_repeats_an_answer(speaker):
    changes = {"do_sample": True, "temperature": 1.5, "top_k": 0}
    one, same, other, *drawn = (whole(speaker.answer(ASKED, greedy(12, **changes, seed=n))) for n in (5, 5, 6, -1, -1))
    assert one == same != other and drawn[0] != drawn[1]


OWN = {"do_sample": True, "max_new_tokens": 256, "temperature": 0.3, "top_p": 0.85, "top_k": 5}
OWN |= {"repetition_penalty": 1.05, "seed": -1}
UNSET = {"max_new_tokens": 512, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0, "seed": -1}
CHANGED = {"max_new_tokens": 3, "temperature": 0.7, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.2, "seed": 7}


def test_every_setting_reaches_the_model(speaker, monkeypatch):
    """Sent off its default by itself, each is what the model generates with, and the others stay as they were."""
    seen = {}

    def generate(prompt, generation_config, streamer, **kwargs):
        seen.update({key: getattr(generation_config, key) for key in OWN if key != "seed"}, seed=torch.initial_seed())
        streamer.end()

    monkeypatch.setattr(speaker.model, "generate", generate)
    for name, value in (CHANGED | {"do_sample": False}).items():
        whole(speaker.answer(ASKED, sent := OWN | {name: value}))
        sent |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50} if name == "do_sample" else {}  # transformers' own
        assert seen == sent | ({} if name == "seed" else {"seed": seen["seed"]})  # a random one


def test_the_page_begins_with_the_models_own_settings(speaker, monkeypatch):
    """Where a model names none, with transformers' own defaults, not the ends of the sliders."""
    for expected in (OWN, UNSET):
        (page := web_demo.Page(speaker, PROFILES)).blocks()
        assert expected.items() <= {name: box.value for name, box in page.settings.items()}.items()
        for name in CHANGED.keys() - {"seed"}:
            monkeypatch.setattr(speaker.own_settings, name, None)


def test_a_closed_answer_frees_the_model(speaker, monkeypatch):
    """The page closes it when a visitor stops it or leaves; the next one then waits for one token, not for 3,000."""
    tokens, threads = pause_generation(monkeypatch, speaker.model, after=5)
    next(stream := speaker.answer(ASKED, greedy(3000, repetition_penalty=2.0)))
    assert speaker.turn.locked()
    stream.close()
    assert not speaker.turn.locked() and 0 < len(tokens) <= 5 and [thread.is_alive() for thread in threads] == [False]


@pytest.mark.parametrize("kind, words, told", [
    (torch.OutOfMemoryError, "CUDA out of memory", MemoryError), (RuntimeError, "a defect", RuntimeError),
    (RuntimeError, "can't allocate memory: 1 bytes", MemoryError),
])  # fmt: skip
def test_out_of_memory_is_told_apart_and_survived(speaker, monkeypatch, kind, words, told):
    def fail(*args, **kwargs):
        raise kind(words)

    with monkeypatch.context() as patch, pytest.raises(told, match=words):
        patch.setattr(speaker.model, "generate", fail)
        whole(speaker.answer(ASKED, greedy(5)))
    assert whole(speaker.answer(ASKED, greedy(5)))


@pytest.mark.parametrize("dtype, held", [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_half_precision_checkpoints(checkpoint, tmp_path, dtype, held):
    opened = ModelDirectory(checkpoint)
    for part in (opened.load(dtype), opened.tokenizer, opened.generation_config):
        part.save_pretrained(tmp_path)
    speaker = Speaker.load(tmp_path, None, torch.device("cpu"))
    assert speaker.model.dtype == held and whole(speaker.answer(ASKED, greedy(5)))


@torch.no_grad()
def test_the_base_model_and_all_between_answer_beside_the_adapter(checkpoint, adapter, speaker):
    """As models do that have the adapter's update, times its strength, in their weights; words are coloured so."""
    both, answer = (
        Speaker.load(checkpoint, adapter, torch.device("cpu")),
        "我是李白🎵。\ufffd",
    )  # the note: a token a byte
    prompt, answer_ids, texts, gains = (
        messages_to_ids(both.tokenizer, ASKED),
        both.tokenizer.text_to_ids(answer),
        [],
        [],
    )
    for strength in (0.0, 0.5, 1.0):
        wrapped = PeftModel.from_pretrained(ModelDirectory(checkpoint).load(torch.float32), adapter)
        for module in (module for module in wrapped.modules() if hasattr(module, "scaling")):
            module.scaling = {name: scale * strength for name, scale in module.scaling.items()}
        merged = Speaker(wrapped.merge_and_unload().eval(), both.tokenizer)
        texts.append(whole(merged.answer(ASKED, greedy(20))))
        for _ in range(2):  # the second time from the caches, which must not be taken for one another
            assert whole(both.answer(ASKED, greedy(20), strength=strength)) == texts[-1]
            assert whole(both.answer(ASKED, greedy(20), base=True, strength=strength)) == texts[0]
        logits = merged.model(input_ids=torch.tensor([prompt + answer_ids])).logits[0].log_softmax(-1)
        gains.append(sum(logits[len(prompt) + n - 1, id].item() for n, id in enumerate(answer_ids)))
        words = both.words(ASKED, answer, strength)
        assert "".join(word for word, _ in words) == answer and len(words) > 1
        assert sum(gain for _, gain in words) == pytest.approx(gains[-1] - gains[0], abs=1e-3)
    assert len(set(texts)) == 3 and texts[0] == whole(speaker.answer(ASKED, greedy(20)))


@pytest.mark.parametrize("marker", ["<reserved_106>", "<reserved_107>", "</s>", "<s>", "<unk>"])
def test_no_text_becomes_a_control_token(speaker, marker):
    """What the model reads holds the two markers of the layout, and no other control token, whoever wrote the text."""
    text = f"好{marker}你是谁？"
    ids, _, _ = speaker.fit(conversation(text, text, text, role=marker, description=text), 5, begun=text)
    markers = [speaker.own_settings.user_token_id, speaker.own_settings.assistant_token_id]
    assert [id for id in ids if id in (0, 1, 2, *markers)] == markers * 2


# ---------------------------------------------------------------- what the browser keeps


def version(text: str, state="done", base="") -> dict:
    return {"text": text, "base": base, "state": state}


def turn(question, *versions, shown=0) -> dict:
    return {"question": question, "versions": list(versions), "shown": shown}


def kept(*turns) -> dict:
    """Two conversations with a role, of which the second one is shown, and one with another role."""
    other = {"id": "1", "greeting": "", "turns": [turn("早？", version("早。"))]}
    both = [other, {"id": "2", "greeting": "来也！", "turns": list(turns)}]
    return {"role": "李白", "chats": {"李白": both, "张飞": [other | {"id": "3"}]}, "shown": {"李白": 1, "张飞": 0}}


def test_what_is_kept_comes_back():
    """And numbers of what is not there become those of what is."""
    expected = kept(turn("谁？", version("我\u2028<b>"), version("", "stopped", "b"), shown=1), turn("还有？"))
    assert chats.read(chats.write(expected)) == expected
    beyond = json.loads(chats.write(expected)) | {"shown": {"李白": 9, "张飞": -9}}
    beyond["chats"]["李白"][1]["turns"][0]["shown"] = 9
    assert chats.read(chats.write(beyond)) == expected


MALFORMED = [None, 5, "", "{", "null", "[]", "5", '"a"', "[" * 200_000, '{"a":' * 200_000]
OTHERS = [{}, {"role": "a"}, {"role": "a", "chats": []}, {"role": "a", "chats": {"a": 5}, "shown": {}}]
OTHERS += [kept(part) for part in (None, 5, "a", [], {}, turn("a", None), turn("a", {"text": "a"}))]
OTHERS += [kept(turn("a", shown=shown)) for shown in (None, "x", [], float("nan"))]
OTHERS += [kept() | {"shown": shown} for shown in (None, [], {"李白": None}, {"李白": {}})]


def test_anything_malformed_is_nothing():
    for text in MALFORMED + list(map(chats.write, OTHERS)):
        assert chats.read(text) == {"role": "", "chats": {}, "shown": {}}, text
    assert all(chats.read_texts(text) == {} for text in MALFORMED)
    assert chats.read_texts('{"a": "b", "c": 5}') == {"a": "b", "c": "5"}


GROWN = {"id": "2", "text": "我是", "base": "b", "state": "cut"}


@pytest.mark.parametrize("versions, grown, ended, after, lost", [
    ([version("")], GROWN, True, [version("我是", "cut", "b")], ""),
    ([version("", "stopped")], {"id": "2", "text": "我"}, False, [version("我", "stopped")], ""),
    ([version("")], GROWN | {"text": " "}, True, None, "问"),
    ([version("")], GROWN | {"text": ""}, False, [version("", "cut", "b")], ""),
    ([version("x"), version("")], GROWN | {"text": ""}, True, [version("x")], ""),
    ([version("")], GROWN | {"id": "4"}, True, [version("")], ""),
    ([version("x")], {}, True, [version("x")], ""),
    (None, GROWN, True, None, ""),
])  # fmt: skip
def test_an_answer_is_kept_as_far_as_it_is_written(versions, grown, ended, after, lost):
    """A question without a word of an answer goes back; other conversations stay as they are."""
    found = kept(turn("问", *versions, shown=len(versions) - 1)) if versions else kept()
    assert chats.settle(found, grown, ended) == lost
    assert found == (kept(turn("问", *after)) if after else kept())


def test_conversations_come_and_go():
    found = chats.read("{}")
    first = chats.open_chat(found, "李白", "来也！")
    assert chats.open_chat(found, "李白", "") is first and (first["greeting"], first["turns"]) == ("来也！", [])
    second, third = (chats.add(found, chats.new_chat("")) for _ in range(2))
    assert len({chat["id"] for chat in (first, second, third)}) == 3 and found["shown"] == {"李白": 2}
    found["shown"]["李白"] = 1
    for left in (third, first):
        chats.remove(found)
        assert chats.open_chat(found, "李白", "") is left
    chats.remove(found)
    assert found == {"role": "李白", "chats": {}, "shown": {}}
    turns = [(0, "question"), (0, "text"), (1, "question"), (1, "text")]  # of the bubbles
    assert [chats.turn_of_bubble(first, bubble) for bubble in range(5)] == [(0, "greeting"), *turns]
    assert [chats.turn_of_bubble(second, bubble) for bubble in range(4)] == turns


@pytest.mark.parametrize("greeted", [True, False])
def test_whole_conversations_become_training_data(greeted):
    found = kept(
        turn("一", version("甲", "cut"), version("乙", "edited"), version("丙"), shown=2),
        turn("二", version("丁"), version("丁"), version("  ")),
        turn("三", version("戊", "stopped"), version("己", "done")),
        turn("四", version("庚")),
    )
    begin = ["来也！"] if greeted else []
    expected = [["早？", "早。"], [*begin, "一", "丙", "二", "丁"], [*begin, "一", "乙"]]
    expected += [[*begin, "一", "丙", "二", "丁", "三", "己"]]
    lines = list(map(json.loads, chats.samples(found, "诗人", greeted).splitlines()))
    assert [[message["content"] for message in line["messages"]] for line in lines] == expected
    roles = [[message["role"] for message in line["messages"]] for line in lines]
    assert all({*of[::-2]} == {"assistant"} and {*of[-2::-2]} == {"user"} for of in roles)
    assert all((line["role"], line["system"]) == ("李白", "诗人") for line in lines)


# ---------------------------------------------------------------- looks, and who may call


def test_what_is_shown_is_exactly_the_text(tmp_path):
    for text in ("a", '<b onclick="x">&amp;</b>', "&lt;", "&&#38;", "'\n\\($x$"):
        (part,) = look.exactly(text)
        assert html.unescape(part["text"]) == text and "<" not in part["text"]
    differences = (-5, -4.9, -2, -1.9, -0.5, -0.4, 0, 0.4, 0.5, 1.9, 2, 4.9, 5)
    assert "|".join(look.mark(gain) or "" for gain in differences) == "−−−|−−|−−|−|−||||+|+|++|++|+++"
    Image.new("P", (640, 320)).save(tmp_path / "a.gif")
    with urlopen(look.portrait("a", tmp_path / "a.gif")) as data, Image.open(data) as picture:
        assert (picture.format, picture.size) == ("PNG", (128, 64))
    fields = [{key: sorted(str(part[1]) for part in string.Formatter().parse(text) if part[1]) for key, text in texts.items()}
              for texts in look.TEXTS.values()]  # fmt: skip
    assert fields[0] == fields[1] and len(fields) == 2  # both languages say the same


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
