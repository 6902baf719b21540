"""The chat page in Chromium, as people use it, on a small random model with an adapter."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from conftest import NO_CHROMIUM
from playwright.sync_api import Error, expect, sync_playwright
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
from web_client import DESC_PATH, Server, conversation, free_port, greedy, squeezed, whole

import train
from data_helper import persona
from support.dialogues.profiles import read_characters
from support.page.speaker import Speaker

CHARACTERS = read_characters(DESC_PATH)
FIRST = next(iter(CHARACTERS))
expect.set_options(timeout=60_000)  # a slow machine is no fault of the page; waits end as soon as they can
DESKTOP, PHONE = {"width": 1280, "height": 820}, {"width": 390, "height": 780}
SIZES = [(1280, 820), (820, 1180), (390, 780), (360, 640)]
EXACT = '  <a&b> *x* $y$ &lt; "q" <img src=/file onerror=alert(1)>\n\n 🎵 ![](http://192.0.2.1/a.png) **c**'

# Greedy answers of 16 tokens unless set otherwise; a token takes 10 ms at least, so that an answer has a middle.
PROGRAM = """
import os, sys, time
sys.path.insert(0, os.getcwd())
sys.argv[0] = "web_demo.py"
import web_demo
load, answer = web_demo.Speaker.load, web_demo.Speaker.answer
def loaded(*args):
    speaker = load(*args)
    speaker.own_settings.do_sample, speaker.own_settings.max_new_tokens = False, 16
    return speaker
def answering(*args, **more):
    with web_demo.closing(answer(*args, **more)) as stream:
        for step in stream:
            time.sleep(0.01)
            yield step
web_demo.Speaker.load, web_demo.Speaker.answer = loaded, answering
web_demo.main()
"""


@pytest.fixture(scope="module")
def server(checkpoint, page_adapter, tmp_path_factory):
    server = Server(
        tmp_path_factory.mktemp("server") / "log", checkpoint, "--adapter_path", page_adapter, program=("-c", PROGRAM)
    )
    yield server
    server.close()
    assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="module")
def speaker(checkpoint, page_adapter):
    return Speaker.load(checkpoint, page_adapter, torch.device("cpu"))


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = launch(playwright.chromium)
        yield browser
        browser.close()


def launch(chromium):
    """The machine's Chromium, or else the one that Playwright's installer gets; without either the test is skipped.

    With the environment variable CI set it fails instead, as nobody reads what was skipped there.
    """
    path = shutil.which("chromium") or chromium.executable_path
    if not Path(path).exists():
        install = [sys.executable, "-m", "playwright", "install", "--no-shell", "chromium"]
        patience = {"PLAYWRIGHT_DOWNLOAD_CONNECTION_TIMEOUT": "5000"}  # milliseconds, for each of its attempts
        subprocess.run(install, env=patience | os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        return chromium.launch(executable_path=path, args=flags)
    except Error:  # no such file, or libraries of the system that it needs are not there
        if os.environ.get("CI"):
            raise
        pytest.skip(NO_CHROMIUM)


class Tab:
    """One browser on the page."""

    def __init__(self, browser, url, language="en-US", viewport=DESKTOP, **kwargs):
        self.context = browser.new_context(locale=language, viewport=viewport, accept_downloads=True, **kwargs)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.elsewhere, self.dialogs, self.errors = [], [], []
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        home = (url, "data:", "blob:")
        self.page.on("request", lambda r: r.url.startswith(home) or self.elsewhere.append(r.url))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.accept()))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        find = self.page.locator
        self.question, self.who, self.toast = find("#question textarea"), find("#who"), find(".toast-body")
        self.questions, self.bubbles = find("#log .user .md"), find("#log .bot .md")
        self.options, self.chats = find("#log .option"), find("#number input")
        self.send, self.stop = find("#question .submit-button"), find("#question .stop-button")
        self.open(url)

    def open(self, url):
        self.page.goto(url)
        self.ready()

    def reload(self):
        self.page.reload()
        self.ready()

    def ready(self):
        expect(self.send).to_have_text(re.compile("Send|发送"))
        expect(self.page.locator("#log .message-row, #log [role=complementary]").first).to_be_attached()

    def button(self, name: str, last: int = -1):
        return self.page.get_by_role("button", name=name).nth(last)

    def settings(self, *sections: str):
        """Open the settings, and sections of them; called again, close them."""
        self.page.locator("#settings .toggle-button").click()
        for section in sections:
            if "open" not in self.button(section).get_attribute("class").split():
                self.button(section).click()
        slid = "Promise.all(document.getAnimations().filter((a) => a instanceof CSSTransition).map((a) => a.finished))"
        self.page.evaluate(f"{slid}.catch(() => {{}}).then(() => 0)")

    def longest(self, tokens: int):
        self.settings("Sampling")
        field = self.page.get_by_label("number input for Longest reply")
        field.fill(str(tokens))
        field.press("Enter")
        self.settings()

    def role(self, name: str):
        self.page.locator("#cards button", has_text=name).click()
        expect(self.who).to_contain_text(name)

    def begin(self, text: str):
        """Ask, and wait for the first word."""
        before = self.bubbles.count()
        self.question.fill(text)
        self.question.press("Enter")
        expect(self.bubbles).to_have_count(before + 1)
        expect(self.bubbles.last).to_have_text(re.compile(r"\S"))

    def ask(self, text: str) -> str:
        """Ask, wait for the end of the answer, and return it."""
        self.begin(text)
        return self.finished()

    def finished(self) -> str:
        expect(self.send).to_be_visible()
        expect(self.page.locator("#log .options")).to_have_count(1)
        return self.answer()

    def answer(self) -> str:
        return squeezed(self.bubbles.last.inner_text())

    def edit(self, bubble: str, text: str):
        """Edit the last question (user) or answer (bot)."""
        side = {"user": "right", "bot": "left"}[bubble]
        buttons = self.page.locator(f"#log .message-buttons-{side}").last
        buttons.get_by_role("button", name="Edit").click()
        self.page.locator(".edit-textarea").fill(text)
        buttons.get_by_role("button", name="Submit").click()
        expect(self.page.locator(".edit-textarea")).to_have_count(0)

    def close(self):
        self.context.close()
        assert self.elsewhere == [] and self.errors == []


@pytest.fixture
def open_tab(browser, server):
    tabs = []

    def open_tab(*args, **kwargs):
        tabs.append(Tab(browser, server.url, *args, **kwargs))
        return tabs[-1]

    yield open_tab
    for tab in tabs:
        tab.close()


@pytest.fixture
def tab(open_tab):
    return open_tab()


def expected(speaker, *turns, role=FIRST, description=None, tokens=16, **kwargs) -> str:
    messages = conversation(*turns, role=role, description=description or CHARACTERS[role]["description"])
    return squeezed(whole(speaker.answer(messages, greedy(tokens), **kwargs)))


def test_each_role_greets_and_its_conversation_is_kept(tab, speaker):
    expect(tab.page.locator("#cards button").first).to_contain_text(CHARACTERS[FIRST]["greeting"][:10])
    assert tab.page.locator("#cards img").count() == len(CHARACTERS)
    expect(tab.bubbles).to_have_text([CHARACTERS[FIRST]["greeting"]])
    expect(tab.options).to_have_text(CHARACTERS[FIRST]["questions"])
    tab.question.fill("再说")
    tab.options.first.click()
    expect(tab.questions).to_have_text(CHARACTERS[FIRST]["questions"][:1])
    first = tab.finished()
    assert first == expected(speaker, CHARACTERS[FIRST]["questions"][0])
    expect(tab.question).to_have_value("再说")  # a question to begin with leaves the draft alone
    tab.role("李白")
    expect(tab.questions).to_have_count(0)
    assert tab.ask("你好。") == expected(speaker, "你好。", role="李白")
    tab.role(FIRST)
    expect(tab.questions).to_have_count(1)
    tab.reload()
    expect(tab.bubbles).to_have_count(2)
    second = tab.ask("再说一遍。")
    assert second == expected(speaker, CHARACTERS[FIRST]["questions"][0], first, "再说一遍。")
    assert second != expected(speaker, "再说一遍。")


def test_an_answer_is_stopped_continued_and_left(tab, speaker):
    tab.longest(1500)
    tab.begin("你是谁？")
    tab.question.fill("再说一遍。")
    tab.question.press("Enter")
    expect(tab.toast).to_contain_text("still being written")
    expect(tab.question).to_have_value("再说一遍。")
    tab.stop.click()
    stopped = tab.finished()
    expect(tab.options).to_have_text(["Stopped. Continue"])
    expect(tab.question).to_have_value("再说一遍。")
    tab.options.click()
    expect(tab.stop).to_be_visible()
    tab.role("李白")  # which stops it, too; what was written stays
    expect(tab.bubbles).to_have_count(1)
    expect(tab.send).to_be_visible()
    tab.role(FIRST)
    expect(tab.bubbles).to_have_count(2)
    assert tab.answer().startswith(stopped)
    tab.longest(4)
    tab.button("Undo").click()
    expect(tab.bubbles).to_have_count(1)
    expect(tab.question).to_have_value("再说一遍。")
    begun = tab.ask("你是谁？")
    expect(tab.options).to_have_text(["Cut at the longest reply. Continue"])
    tab.options.click()
    expect(tab.bubbles.last).not_to_have_text(begun)
    assert tab.finished() == expected(speaker, "你是谁？", tokens=8)
    tab.button("Undo").click()
    expect(tab.question).to_have_value("你是谁？")
    expect(tab.questions).to_have_count(0)


def test_a_restart_of_the_server_in_mid_answer_loses_nothing(browser, checkpoint, tmp_path):
    server = Server(tmp_path / "log", checkpoint, program=("-c", PROGRAM))
    tab = Tab(browser, server.url)
    try:
        first = tab.ask("你是谁？")
        tab.longest(1500)
        tab.begin("你好。")
    finally:
        server.close()
    tab.question.fill("再说一遍。")
    server = Server(tmp_path / "log", checkpoint, program=("-c", PROGRAM), port=server.port)
    try:
        tab.open(server.url)
        expect(tab.questions).to_have_text(["你是谁？", "你好。"])
        assert squeezed(tab.bubbles.nth(1).inner_text()) == first and tab.answer()
        tab.finished()
        expect(tab.options.last).to_have_text("Stopped. Continue")
        tab.ask("再说一遍。")
    finally:
        server.close()
        tab.context.close()


def test_answers_are_paged_edited_and_read(tab, speaker):
    tab.settings("Sampling")
    tab.page.get_by_label("Sampling (off").check()
    for name, value in {"Temperature": 2, "Top-k": 0, "Top-p": 1}.items():
        tab.page.get_by_label(f"number input for {name}").fill(str(value))
    tab.page.get_by_label("Seed").fill("7")
    tab.page.get_by_label("Seed").press("Enter")
    tab.settings()
    first = tab.ask("你是谁？")
    tab.button("Retry").click()
    expect(tab.options.first).to_have_text("‹ Previous answer 1/2")
    assert tab.finished() != first
    tab.options.first.click()
    expect(tab.options.first).to_have_text("Next answer 2/2 ›")
    assert tab.answer() == first
    tab.reload()
    assert tab.answer() == first
    tab.settings("Sampling")
    expect(tab.page.get_by_label("number input for Temperature")).to_have_value("2")  # kept over the reload
    tab.page.get_by_label("Sampling (off").uncheck()
    tab.settings()
    tab.edit("bot", "我是石头。")
    expect(tab.bubbles.last).to_have_text("我是石头。")
    expect(tab.options).to_have_text(["‹ Previous answer 2/3"])
    assert tab.ask("再说一遍。") == expected(speaker, "你是谁？", "我是石头。", "再说一遍。")
    tab.edit("user", "你好。")  # goes on in a conversation of its own
    expect(tab.chats).to_have_value("你是谁？")
    expect(tab.questions).to_have_text(["你是谁？", "你好。"])
    assert tab.finished() == expected(speaker, "你是谁？", "我是石头。", "你好。")
    tab.edit("bot", "   ")
    expect(tab.toast).to_contain_text("please write something")
    expect(tab.bubbles.last).to_have_text(re.compile(r"\S"))


def test_several_conversations_with_a_role(tab):
    tab.ask("一？")
    tab.page.locator("#fresh").click()
    expect(tab.questions).to_have_count(0)
    tab.ask("二？")
    expect(tab.chats).to_have_value("二？")
    tab.chats.click()
    tab.page.get_by_role("option", name="一？").click()
    expect(tab.questions).to_have_text(["一？"])
    tab.settings("What was said")
    tab.button("Delete this chat").click()
    expect(tab.questions).to_have_text(["二？"])
    expect(tab.chats).to_have_count(0)
    tab.role("李白")
    tab.ask("三？")
    tab.button("Delete all").click()
    expect(tab.who).to_contain_text(FIRST)
    tab.reload()
    expect(tab.questions).to_have_count(0)
    assert tab.dialogs == ["Delete this chat for good?", "Delete all conversations with all characters for good?"]


def test_nothing_is_deleted_without_a_yes(tab):
    tab.ask("一？")
    tab.page.evaluate("window.confirm = () => false")
    tab.settings("What was said")
    for name in ("Delete this chat", "Delete all"):
        tab.button(name).click()
    tab.ask("二？")
    tab.reload()
    expect(tab.questions).to_have_text(["一？", "二？"])


def test_a_persona_is_edited_and_restored(tab, speaker):
    tab.settings()
    field = tab.page.locator("#description textarea")
    field.fill("一块石头")
    tab.role("李白")
    tab.role(FIRST)
    tab.reload()
    assert tab.ask("你是谁？") == expected(speaker, "你是谁？", description="一块石头")
    tab.settings()
    tab.button("Restore").click()
    expect(field).to_have_value(CHARACTERS[FIRST]["description"])
    tab.button("Retry").click()
    expect(tab.options.first).to_contain_text("1/2")
    assert tab.finished() == expected(speaker, "你是谁？")


def test_a_new_character(tab, speaker):
    tab.button("New character").click()
    name, about = (tab.page.locator("#roles").get_by_label(label) for label in ("Name", "Who the role is"))
    for given, words in (("", "please write something"), (FIRST, "of this name already")):
        name.fill(given)
        about.fill("枭雄")
        tab.button("Talk to them").click()
        expect(tab.toast.filter(has_text=words)).to_be_visible()
    name.fill("曹操")
    tab.button("Talk to them").click()
    expect(tab.who).to_contain_text("曹操")
    tab.reload()
    assert tab.ask("你是谁？") == expected(speaker, "你是谁？", role="曹操", description="枭雄")


def test_before_after_colours_and_strength(tab, speaker):
    tab.settings()
    tab.page.get_by_label("Base model").check()
    tab.page.get_by_label("Colour the words").check()
    tab.settings()
    answer = tab.ask("你是谁？")
    base, words = tab.page.locator("#base .bot .md").last, tab.page.locator("#words")
    assert answer == expected(speaker, "你是谁？")
    assert squeezed(base.inner_text()) == expected(speaker, "你是谁？", base=True) != answer
    left, right = (tab.page.locator(name).bounding_box() for name in ("#log", "#base"))
    assert left["x"] + left["width"] <= right["x"] and left["y"] == right["y"]
    messages = conversation("你是谁？", role=FIRST, description=CHARACTERS[FIRST]["description"])
    gains = speaker.words(messages, tab.bubbles.last.inner_text())
    expect(words).to_contain_text(f"sum {sum(gain for _, gain in gains):+.1f} nats")
    assert squeezed(words.locator(".textfield").inner_text()) == answer
    tab.page.set_viewport_size(PHONE)
    above, below = (tab.page.locator(name).bounding_box() for name in ("#log", "#base"))
    assert above["y"] + above["height"] <= below["y"]
    tab.page.set_viewport_size(DESKTOP)
    tab.settings()
    tab.page.get_by_label("Base model").uncheck()
    expect(base).to_have_count(0)
    tab.page.get_by_label("number input for Strength").fill("0")
    tab.page.get_by_label("number input for Strength").press("Enter")
    tab.page.locator("#fresh").click()
    expect(tab.questions).to_have_count(0)
    assert tab.ask("你是谁？") == expected(speaker, "你是谁？", base=True)


def test_talk_download_train_ask(tab, checkpoint, train_arguments, tmp_path):
    """A character is talked to and corrected; what the page then gives is trained on as it is, and it answers so."""
    turns = ["你从哪里来？", "花果山，水帘洞。", "那里有什么？", "桃子，还有猴儿们。"]
    tab.settings("What was said")
    tab.button("Download").click()
    expect(tab.toast).to_contain_text("no finished answer")
    tab.settings()
    for question, answer in (turns[:2], turns[2:]):
        tab.ask(question)
        tab.edit("bot", answer)
        expect(tab.options).to_have_text(["‹ Previous answer 1/2"])
    tab.ask("还有呢？")  # is cut, and ends no sample
    tab.settings()
    with tab.page.expect_download() as download:
        tab.button("Download").click()
    assert download.value.suggested_filename == "conversation.jsonl"
    path, often, run = download.value.path(), tmp_path / "train.jsonl", tmp_path / "run"
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    common = {"role": FIRST, "system": persona(FIRST, CHARACTERS[FIRST]["description"])}
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [common | {"messages": messages}]
    often.write_text(60 * path.read_text(encoding="utf-8"), encoding="utf-8")  # one epoch saves and evaluates once
    step = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1, "--learning_rate", 1e-2]
    rest = ["--train_path", often, "--test_path", path, "--weight_decay", 0, "--sample_answers", 0]
    train.main(train_arguments(run, *step, *rest, "--save_total_limit", 1))
    speaker = Speaker.load(checkpoint, run / "epoch-1-step-60", torch.device("cpu"))
    for known in (1, 3):  # turns that are said before the answer
        assert expected(speaker, *turns[:known], tokens=32) == turns[known]


def test_bubbles_and_clipboard_are_exact(tab):
    """Nothing in a text is HTML, Markdown or LaTeX, is run, or is fetched; and an edit begins with the text itself."""
    tab.ask(EXACT)
    tab.edit("bot", EXACT)
    expect(tab.options).to_have_text(["‹ Previous answer 1/2"])
    for side, text in (("right", tab.questions.last), ("left", tab.bubbles.last)):
        assert text.inner_text() == EXACT
        buttons = tab.page.locator(f"#log .message-buttons-{side}").last
        buttons.get_by_role("button", name="Copy").click()
        expect(buttons.get_by_role("button", name="Copied")).to_be_visible()
        assert tab.page.evaluate("navigator.clipboard.readText()") == EXACT
        buttons.get_by_role("button", name="Edit").click()
        tab.page.locator(".edit-textarea").click()  # to place the cursor
        expect(tab.page.locator(".edit-textarea")).to_have_value(EXACT)
        buttons.get_by_role("button", name="Cancel").click()
        expect(text).to_have_text(EXACT)
    assert tab.page.locator("#log .message :is(img, script, a, b, strong, em, code, .katex)").count() == 0
    tab.reload()
    assert tab.bubbles.last.inner_text() == EXACT and tab.dialogs == []


def test_refusals_and_failures_are_told_and_the_draft_is_kept(browser, checkpoint, tmp_path):
    server = Server(tmp_path / "log", checkpoint, program=("-c", PROGRAM))
    tab = Tab(browser, server.url)
    try:
        for text, words in (
            (" ", "Question: please write something."),
            ("字" * 7000, "leaves no room for a reply"),
            ("字" * 8001, "at most 8,000"),
        ):
            tab.question.fill(text)
            told = tab.toast.filter(has_text=words).first
            for _ in range(30):  # gradio drops an Enter as long as the listener of the last one has not ended
                tab.question.press("Enter")
                with suppress(AssertionError):
                    expect(told).to_be_visible(timeout=2000)
                    break
            expect(told).to_be_visible()
            expect(tab.question).to_have_value(text)
            expect(tab.questions).to_have_count(0)
    finally:
        server.close()
    tab.question.fill("再说一遍。")
    tab.question.press("Enter")
    expect(tab.toast.last).to_contain_text(re.compile("onnection|reach"))
    expect(tab.question).to_have_value("再说一遍。")
    tab.context.close()


def test_who_waits_sees_it_and_is_answered(open_tab, speaker):
    one, other = open_tab(), open_tab()
    one.longest(1500)
    one.begin("你是谁？")
    other.question.fill("再说一遍。")
    other.question.press("Enter")
    expect(other.page.locator("#log")).to_contain_text(re.compile("queue: 1/1"))
    one.page.reload()  # a visitor who leaves frees the model
    expect(other.bubbles).to_have_count(2)
    assert other.finished() == expected(speaker, "再说一遍。")


def test_one_can_scroll_up_while_an_answer_is_written(open_tab):
    tab = open_tab(viewport={"width": 390, "height": 420})
    tab.longest(2000)
    tab.begin("长\n" * 30)
    log = tab.page.locator("#log .bubble-wrap")
    log.evaluate("log => log.scrollTop = -log.scrollHeight")  # the log is laid out from below: 0 is its end
    top = log.evaluate("log => log.scrollTop + log.scrollHeight - log.clientHeight")
    begun = len(tab.answer())
    expect(tab.bubbles.last).to_have_text(re.compile(f"[\\s\\S]{{{begun + 20}}}"))
    assert abs(log.evaluate("log => log.scrollTop + log.scrollHeight - log.clientHeight") - top) < 2
    log.evaluate("log => log.scrollTop = 0")
    begun = len(tab.answer())
    expect(tab.bubbles.last).to_have_text(re.compile(f"[\\s\\S]{{{begun + 20}}}"))
    assert log.evaluate("log => log.scrollTop") > -2  # it follows
    tab.stop.click()
    tab.finished()


@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_the_composer_is_there_at_every_size(open_tab, language):
    tab = open_tab(language)
    for lines in (1, 30):
        tab.question.fill("字\n" * lines)
        for width, height in SIZES:
            tab.page.set_viewport_size({"width": width, "height": height})
            for element in (tab.question, tab.send, tab.page.locator("#fresh")):
                expect(element).to_be_in_viewport(ratio=1)
            page = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
            assert tab.page.evaluate(page) == [width, height]
            assert tab.page.locator("#log").bounding_box()["height"] >= 100


def test_a_phone_shows_the_roles_when_asked(open_tab):
    tab = open_tab(viewport=PHONE)
    expect(tab.page.locator("#cards")).not_to_be_visible()
    tab.page.locator("#roles .toggle-button").click()
    tab.role("李白")
    expect(tab.page.locator("#cards")).not_to_be_visible()


@pytest.mark.parametrize("scheme, language", [("light", "zh-CN"), ("dark", "en-US")])
def test_names_and_contrast(open_tab, scheme, language):
    """axe-core finds nothing serious; the Chinese page has no English of ours."""
    chinese = language == "zh-CN"
    for viewport in (DESKTOP, PHONE):
        tab = open_tab(language, viewport=viewport, color_scheme=scheme)
        tab.settings("采样" if chinese else "Sampling", "说过的话" if chinese else "What was said")
        for number in (0, 1):
            tab.page.locator("#settings input[type=checkbox]").nth(number).check()
        seen = [tab.page.locator("#settings").inner_text()]
        check(tab)
        tab.settings()
        tab.ask("你是谁？")
        expect(tab.page.locator("#words .textfield")).to_be_visible()
        check(tab)
        if viewport == PHONE:
            tab.page.locator("#roles .toggle-button").click()
        tab.button("新角色" if chinese else "New character").click()
        seen += [tab.page.locator("#roles").inner_text(), tab.page.locator("#top").inner_text(), tab.send.inner_text()]
        check(tab)
        assert not chinese or not re.findall(r"\b(?!token|Top|nat)[A-Za-z]{3,}", " ".join(seen))


def check(tab):
    violations = Axe().run(tab.page).response["violations"]
    serious = [found for found in violations if found["impact"] in ("serious", "critical")]
    assert not serious, [(found["id"], [node["html"][:150] for node in found["nodes"]]) for found in serious]


def test_behind_a_proxy_with_a_path_of_its_own(browser, checkpoint, tmp_path):
    """As nginx's `location /chat/ { proxy_pass http://…/; proxy_set_header Host $http_host; }`."""
    port = free_port()
    flags = ["--root_path", "/chat", "--allowed_hosts", "roles.localhost"]
    server = Server(tmp_path / "log", checkpoint, *flags, program=("-c", PROGRAM))

    async def forward(request):
        path = request.url.path.removeprefix("/chat") or "/"
        headers = [(k, v) for k, v in request.headers.items() if k != "accept-encoding"]
        sent = client.build_request(request.method, f"{server.url}{path}?{request.url.query}", headers=headers,
                                    content=await request.body())  # fmt: skip
        answer = await client.send(sent, stream=True)
        return StreamingResponse(answer.aiter_raw(), answer.status_code, dict(answer.headers))

    client = httpx.AsyncClient(timeout=None)
    proxy = uvicorn.Server(uvicorn.Config(Starlette(routes=[Route("/chat/{path:path}", forward, methods=["GET", "POST"])]),
                                          port=port, log_level="critical"))  # fmt: skip
    thread = threading.Thread(target=proxy.run, daemon=True)
    thread.start()
    while not proxy.started:
        time.sleep(0.05)
    tab = Tab(browser, f"http://roles.localhost:{port}/chat/")
    try:
        assert tab.ask("你是谁？") == expected(Speaker.load(checkpoint, None, torch.device("cpu")), "你是谁？")
    finally:
        tab.close()
        proxy.should_exit = True
        server.close()
        thread.join(30)


def test_signing_in(browser, checkpoint, tmp_path):
    (tmp_path / "auth").write_bytes(b"\xef\xbb\xbfanna:secret\r\n")
    server = Server(tmp_path / "log", checkpoint, "--auth_file", str(tmp_path / "auth"), program=("-c", PROGRAM))
    page = browser.new_context(locale="zh-CN").new_page()
    try:
        page.goto(server.url)
        for password in ("wrong", "secret"):
            page.get_by_label("用户名").fill("anna")
            page.get_by_label("密码").fill(password)
            page.get_by_role("button", name="登录").click()
            if password == "wrong":
                expect(page.get_by_text("凭据")).to_be_visible()
        expect(page.locator("#who")).to_contain_text(FIRST)
    finally:
        server.close()
        page.context.close()
