"""The chat page as people use it, in Chromium and beside it, on a small random model with an adapter."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from conftest import NO_CHROMIUM
from playwright.sync_api import expect, sync_playwright
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
from web_client import DESC_PATH, Server, conversation, free_port, greedy, squeezed, whole

from data_helper import persona
from support.dialogues.profiles import read_characters
from support.dialogues.samples import read_samples
from support.page.speaker import Speaker
from tests.tools import load_chat

CHARACTERS = read_characters(DESC_PATH)
FIRST = next(iter(CHARACTERS))
expect.set_options(timeout=60_000)  # a slow machine is no fault of the page; waits end as soon as they can
DESKTOP, PHONE = {"width": 1280, "height": 820}, {"width": 390, "height": 780}
SIZES = [(820, 1180), (768, 1024), (360, 640), (390, 780), (1280, 820)]
EXACT = '  <a&b> *x* $y$ &lt; "q" <img src=x onerror=alert(1)></b>\n\n 🎵 ![](http://192.0.2.1/a.png) **c** &amp a<b & 1 < 2'

# Fills the storage of the browser to its last byte, past the page's own watch over it.
FILL = """() => {
    const {contentWindow} = document.body.appendChild(document.createElement("iframe"));
    for (let size = 2 ** 22; size; size >>= 1)
        try { for (let n = 0; ; n++) contentWindow.localStorage.setItem(`x ${size} ${n}`, "x".repeat(size)) } catch {}
}"""

# What a page on this machine has no use for: a proxy that is not there, and one that httpx alone cannot speak to.
PROXIES = {"http_proxy": "http://127.0.0.1:1", "ALL_PROXY": "socks5h://127.0.0.1:1", "no_proxy": "", "NO_PROXY": "a.b"}

# Greedy answers of 16 tokens unless set otherwise; a token takes 10 ms at least, and 100 of a long answer, so that it
# has a middle on slow machines, too. All addresses that the process connects to or looks up are written down.
PROGRAM = """
import os, sys, time
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print(repr(args[event == "socket.connect"]), file=open(os.environ["WATCH"], "a"))
sys.addaudithook(watch)
sys.path.insert(0, os.getcwd())
sys.argv[0] = "web_demo.py"
import web_demo
load, answer = web_demo.Speaker.load, web_demo.Speaker.stream
def loaded(*args):
    speaker = load(*args)
    speaker.own_settings.do_sample, speaker.own_settings.max_new_tokens = False, 16
    return speaker
def answering(*args, **more):
    with web_demo.closing(answer(*args, **more)) as stream:
        for step in stream:
            time.sleep(0.1 if args[2]["max_new_tokens"] > 1000 else 0.01)
            yield step
web_demo.Speaker.load, web_demo.Speaker.stream = loaded, answering
web_demo.main()
"""


@pytest.fixture(scope="module")
def serve(checkpoint, page_adapter, tmp_path_factory):
    def serve(*flags, **kwargs) -> Server:
        directory = tmp_path_factory.mktemp("server")
        environment = dict(os.environ, WATCH=str(directory / "connections"), **PROXIES)
        (directory / "program.py").write_text(PROGRAM)
        flags = ["--adapter_path", page_adapter, *flags]
        return Server(directory / "log", checkpoint, *flags, script=directory / "program.py", env=environment, **kwargs)

    return serve


@pytest.fixture(scope="module")
def server(serve):
    yield (server := serve())
    server.close()


@pytest.fixture(scope="module")
def speaker(checkpoint, page_adapter):
    return Speaker.load(checkpoint, page_adapter, torch.device("cpu"))


@pytest.fixture(scope="module")
def browser():
    with ExitStack() as stack:
        try:
            browser = launch(stack.enter_context(sync_playwright()).chromium)
        except Exception:  # there is none, or a library of the system is not there that it or Playwright's driver needs
            if os.environ.get("CI"):
                raise
            pytest.skip(NO_CHROMIUM)
        yield browser
        browser.close()


def launch(chromium):
    """The machine's Chromium, or else the one that Playwright's installer gets. Raises: playwright's Error."""
    path = shutil.which("chromium") or chromium.executable_path
    if not Path(path).exists():
        install = [sys.executable, "-m", "playwright", "install", "--no-shell", "chromium"]
        patience = {"PLAYWRIGHT_DOWNLOAD_CONNECTION_TIMEOUT": "5000"}  # milliseconds, for each of its attempts
        subprocess.run(install, env=patience | os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    return chromium.launch(executable_path=path, args=flags)


class Tab:
    """One browser on the page."""

    def __init__(self, browser, url=None, language="en-US", viewport=DESKTOP, beside=None, **kwargs):
        """beside: another tab of the same browser."""
        kwargs |= {"locale": language, "viewport": viewport, "permissions": ["clipboard-read", "clipboard-write"]}
        self.context = beside.context if beside else browser.new_context(**kwargs)
        self.elsewhere, self.dialogs, self.errors, self.sure = [], [], [], True
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        home = ("http://127.0.0.1:", "http://roles.localhost:", "data:", "blob:")
        self.page.on("request", lambda r: r.url.startswith(home) or self.elsewhere.append(r.url))
        self.page.on("dialog", self.answer_dialog)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        find = self.page.locator
        self.question, self.who, self.toast = find("#question textarea"), find("#who"), find(".toast-body")
        self.questions, self.bubbles = find("#log .user .md"), find("#log .bot:visible .md")
        self.notice, self.field = find("#notice p"), find(".edit-textarea")
        self.options, self.chats = find("#log .option"), find("#number input")
        self.send, self.stop = find("#question .submit-button"), find("#question .stop-button")
        if url:
            self.page.goto(url)
            self.ready()

    def reload(self):
        self.page.reload()
        self.ready()

    def ready(self):
        expect(self.send).to_have_text(re.compile("Send|发送"))
        expect(self.page.locator("#log .message-row, #log [role=complementary]").first).to_be_attached()

    def answer_dialog(self, dialog):
        self.dialogs.append(dialog.message)
        dialog.accept() if self.sure else dialog.dismiss()

    def button(self, name: str, last: int = -1):
        return self.page.get_by_role("button", name=name).nth(last)

    def settings(self, *sections: str):
        """Open the settings, and sections of them; called again, close them."""
        self.page.locator("#settings .toggle-button").click()
        for section in sections:
            if "open" not in self.button(section).get_attribute("class").split():
                self.button(section).click()
        self.slid()

    def slid(self):
        """Wait until the panels stand still."""
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
        before = self.questions.count()
        self.question.fill(text)
        self.question.press("Enter")
        expect(self.questions).to_have_count(before + 1)
        expect(self.bubbles.last).to_have_text(re.compile(r"[^\s…]"))

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

    def edit(self, bubble: str, text: str | None):
        """Edit the last question (user) or answer (bot), with the keyboard; None: by a click, and leave it as it is."""
        buttons = self.buttons(bubble)
        buttons.get_by_role("button", name="Edit").click()
        if text is None:
            buttons.get_by_role("button", name="Submit").click()
        else:
            self.field.fill(text)
            self.field.press("Enter")
        expect(self.field).to_have_count(0)

    def buttons(self, bubble: str):
        """Those of the last question (user) or answer (bot)."""
        buttons = self.page.locator(f"#log .message-buttons-{ {'user': 'right', 'bot': 'left'}[bubble] }").last
        buttons.hover()
        return buttons

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
    return squeezed(whole(speaker.stream(messages, greedy(tokens), **kwargs)))


def test_roles_and_their_conversations(tab, speaker):
    question, another = CHARACTERS[FIRST]["questions"][0], "再说一遍。"
    expect(tab.page.locator("#cards button").first).to_contain_text(CHARACTERS[FIRST]["greeting"][:10])
    assert tab.page.locator("#cards img").count() == len(CHARACTERS)
    expect(tab.bubbles).to_have_text([CHARACTERS[FIRST]["greeting"]])
    expect(tab.options).to_have_text(CHARACTERS[FIRST]["questions"])
    tab.question.fill("字" * 7000)
    tab.question.press("Enter")
    expect(tab.toast).to_contain_text("leaves no room for a reply")
    expect(tab.question).to_have_value("字" * 7000)
    expect(tab.questions).to_have_count(0)
    tab.question.fill("再说")
    tab.options.first.click()
    expect(tab.questions).to_have_text([question])
    first = tab.finished()
    assert first == expected(speaker, question)
    expect(tab.question).to_have_value("再说")  # a question to begin with leaves the draft alone
    expect(tab.question).to_be_focused()
    tab.role("李白")
    expect(tab.questions).to_have_count(0)
    assert tab.ask("你好。") == expected(speaker, "你好。", role="李白")
    tab.role(FIRST)
    expect(tab.question).to_be_focused()
    expect(tab.questions).to_have_count(1)
    tab.reload()
    expect(tab.bubbles).to_have_count(2)
    expect(tab.page).to_have_title(FIRST)
    second = tab.ask(another)
    assert second == expected(speaker, question, first, another) != expected(speaker, another)

    tab.page.locator("#fresh").click()
    expect(tab.questions).to_have_count(0)
    tab.ask("二？")
    expect(tab.chats).to_have_value("2. 二？")
    tab.chats.click()
    option = tab.page.get_by_role("option", name=f"1. {question}")
    option.hover()
    expect(option).to_have_attribute("title", re.compile(question))
    option.click()
    expect(tab.questions).to_have_text([question, another])
    tab.settings("What was said")
    tab.sure = False
    for name in ("Delete this chat", "Delete all"):
        tab.button(name).click()
    tab.sure = True
    tab.reload()
    expect(tab.questions).to_have_text([question, another])
    tab.settings("What was said")
    tab.button("Delete this chat").click()
    expect(tab.questions).to_have_text(["二？"])
    expect(tab.chats).not_to_be_visible()
    tab.role("李白")
    expect(tab.questions).to_have_text(["你好。"])
    tab.button("Delete all").click()
    expect(tab.who).to_contain_text(FIRST)
    kept = tab.page.evaluate("localStorage['role-play-2-settled']")
    tab.edit("bot", "来者何人？")
    tab.page.wait_for_function("(before) => localStorage['role-play-2-settled'] !== before", arg=kept)
    tab.reload()
    expect(tab.bubbles).to_have_text(["来者何人？"])
    expect(tab.questions).to_have_count(0)
    assert tab.dialogs == ["Delete this chat for good?", "Delete all conversations with all characters for good?"] * 2


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


def test_answers_are_paged_edited_read_and_shown_exactly(tab, speaker):
    """Nothing in a text is HTML, Markdown or LaTeX, is run, or is fetched."""
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
    tab.edit("bot", text := EXACT.replace("&lt;", "").replace("&amp", ""))
    expect(tab.options).to_have_text(["‹ Previous answer 2/3"])
    assert tab.bubbles.last.inner_text() == text
    tab.edit("bot", None)
    expect(tab.options).to_have_text(["‹ Previous answer 3/4"])
    assert tab.ask(EXACT) == expected(speaker, "你是谁？", text, EXACT)
    tab.buttons("user").get_by_role("button", name="Copy").click()
    expect(tab.buttons("user").get_by_role("button", name="Copied")).to_be_visible()
    assert tab.page.evaluate("navigator.clipboard.readText()") == EXACT
    tab.buttons("user").get_by_role("button", name="Edit").click()
    expect(tab.field).to_have_value(EXACT)
    tab.field.press("Escape")
    expect(tab.field).to_have_count(0)
    for _ in range(2):
        assert tab.bubbles.nth(-2).inner_text() == text and tab.questions.last.inner_text() == EXACT
        assert tab.page.locator("#log .message :is(img, script, a, b, strong, em, code, .katex)").count() == 0
        tab.reload()
    tab.edit("user", "你好。")  # goes on in a conversation of its own
    expect(tab.chats).to_have_value("2. 你是谁？")
    expect(tab.questions).to_have_text(["你是谁？", "你好。"])
    assert tab.finished() == expected(speaker, "你是谁？", text, "你好。")
    tab.edit("bot", "   ")
    expect(tab.toast).to_contain_text("please write something")
    expect(tab.bubbles.last).to_have_text(re.compile(r"\S"))
    assert tab.dialogs == []


def test_a_persona_is_edited_and_restored_and_a_character_invented(tab, speaker):
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
    tab.settings()

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
    expect(name).not_to_be_visible()
    expect(tab.page.locator("#log")).to_contain_text("Say something to 曹操")
    tab.reload()
    assert tab.ask("你是谁？") == expected(speaker, "你是谁？", role="曹操", description="枭雄")
    tab.settings()
    expect(tab.page.locator("#restore")).not_to_be_visible()
    for tab.sure in (False, True):
        expect(tab.who).to_contain_text("曹操")
        tab.button("Remove this character").click()
    expect(tab.who).to_contain_text(FIRST)
    tab.reload()
    expect(tab.page.locator("#cards button")).to_have_count(len(CHARACTERS))


def test_before_after_colours_and_strength(tab, speaker):
    tab.settings()
    tab.page.get_by_label("Base model's").check()
    tab.page.get_by_label("Colour the words").check()
    tab.settings()
    answer = tab.ask("你是谁？")
    base, tuned, words = tab.bubbles.nth(-2), tab.bubbles.last, tab.page.locator("#words")
    assert answer == expected(speaker, "你是谁？")
    assert squeezed(base.inner_text()) == expected(speaker, "你是谁？", strength=0.0) != answer
    left, right = (bubble.locator("xpath=ancestor::*[contains(@class, 'bot-row')]") for bubble in (base, tuned))
    before, after = left.bounding_box(), right.bounding_box()
    assert before["x"] + before["width"] <= after["x"] and before["y"] == after["y"]
    for row, name in ((left, "Before fine-tuning"), (right, "After fine-tuning")):
        assert row.locator("img").is_visible()
        assert row.locator(".flex-wrap").evaluate("row => getComputedStyle(row, '::before').content") == f'"{name}"'
    messages = conversation("你是谁？", role=FIRST, description=CHARACTERS[FIRST]["description"])
    gains = speaker.words(messages, tuned.inner_text())
    label = f"sum {sum(gain for _, gain in gains):+.1f} nats"
    expect(words).to_contain_text(label)
    assert squeezed(words.locator(".textfield").inner_text()) == answer
    tab.edit("bot", "俺是孙悟空")
    expect(words.locator(".textfield")).to_have_text(re.compile("俺"))
    tab.options.first.click()  # the colours go with the answer that is shown
    expect(words).to_contain_text(label)
    tab.reload()
    expect(base).to_be_visible()
    expect(words).to_contain_text(label)
    tab.page.set_viewport_size(PHONE)
    expect(right).to_be_in_viewport(ratio=1)
    tab.slid()
    before, after = left.bounding_box(), right.bounding_box()
    assert before["y"] + before["height"] <= after["y"] and before["x"] == after["x"]
    tab.page.set_viewport_size(DESKTOP)
    tab.settings()
    tab.page.get_by_label("Base model's").uncheck()
    expect(tab.bubbles).to_have_count(2)
    tab.page.get_by_label("number input for Strength").fill("0")
    tab.page.get_by_label("number input for Strength").press("Enter")
    tab.page.locator("#fresh").click()
    expect(tab.questions).to_have_count(0)
    assert tab.ask("你是谁？") == expected(speaker, "你是谁？", strength=0.0)


def test_what_was_said_is_downloaded_as_training_data(tab, tmp_path):
    """A character is talked to and corrected; what the page then gives is read by train.py as it is."""
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
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    expected = {"role": FIRST, "system": persona(FIRST, CHARACTERS[FIRST]["description"]), "messages": messages}
    lines = download.value.path().read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [expected]
    assert list(read_samples(download.value.path())) == [expected]


def test_who_waits_sees_it_and_is_answered(open_tab, speaker):
    one, other = open_tab(), open_tab()
    one.longest(1500)
    one.begin("你是谁？")
    other.question.fill("再说一遍。")
    other.question.press("Enter")
    queue = re.compile("queue: 1/1")
    expect(other.questions).to_have_count(1)
    expect(other.page.locator("#log")).to_contain_text(queue)
    other.question.fill("还有呢？")
    other.reload()  # a question without a word of an answer is lost no more than what is typed
    expect(other.question).to_have_value("再说一遍。\n还有呢？")
    expect(other.questions).to_have_count(0)
    other.question.fill("再说一遍。")
    other.question.press("Enter")
    expect(other.page.locator("#log")).to_contain_text(queue)
    expect(other.page.locator("#log :is(.bot.message, .pending):visible")).to_have_count(2)  # the greeting, and one "…"
    expect(other.page.locator("#log .message-buttons-left button").last).to_be_hidden()
    check(other)
    one.page.reload()  # a visitor who leaves frees the model
    expect(other.bubbles).to_have_count(2)
    assert other.finished() == expected(speaker, "再说一遍。")


def test_two_tabs_and_a_full_storage_are_told(browser, open_tab):
    one = open_tab()
    one.role("李白")
    other = open_tab(beside=one)
    expect(other.who).to_contain_text("李白")
    other.role(FIRST)
    one.ask("你是谁？")
    other.role("李白")  # has read what the other one wrote, though it shows another role
    expect(other.questions).to_have_text(["你是谁？"])
    other.longest(1500)
    one.role(FIRST)
    other.begin("再说一遍。")
    one.edit("bot", "来者何人？")
    expect(other.notice).to_contain_text("Another tab has changed")
    other.stop.click()
    other.finished()
    expect(other.notice).to_be_empty()
    one.role("李白")
    expect(one.questions).to_have_text(["你是谁？", "再说一遍。"])
    one.page.evaluate(FILL)
    one.role("张飞")
    expect(one.notice).to_contain_text("storage is full")
    one.page.evaluate("for (const key of Object.keys(localStorage)) if (key.startsWith('x ')) delete localStorage[key]")
    one.role("李白")
    one.longest(8)
    one.ask("你好。")
    expect(one.notice).to_be_empty()
    expect(other.questions).to_have_text(["你是谁？", "再说一遍。", "你好。"])


def test_a_narrow_page_shows_the_roles_when_asked_and_one_can_scroll_up_while_an_answer_is_written(open_tab):
    tab = open_tab()
    cards = tab.page.locator("#cards")
    expect(cards).to_be_visible()
    tab.page.set_viewport_size({"width": 768, "height": 1024})  # a tablet that is turned
    expect(cards).not_to_be_visible()
    for panel, content in (("#roles", cards), ("#settings", tab.page.locator("#description"))):
        tab.page.locator(f"{panel} .toggle-button").click()
        expect(content).to_be_visible()
        tab.page.keyboard.press("Escape")
        expect(content).not_to_be_visible()
    tab.page.set_viewport_size({"width": 390, "height": 420})
    tab.page.locator("#roles .toggle-button").click()
    tab.role("李白")
    expect(cards).not_to_be_visible()
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


@pytest.mark.parametrize("scheme, language", [("light", "zh-CN"), ("dark", "en-US")])
def test_sizes_names_and_contrast(open_tab, scheme, language):
    """The composer is there at every size, axe-core finds nothing serious; the Chinese page has no English of ours."""
    chinese, seen = language == "zh-CN", []
    tab = open_tab(language, color_scheme=scheme)
    expect(tab.page.get_by_role("region", name="角色" if chinese else "Characters")).to_be_visible()
    tab.page.locator("#roles .toggle-button").click()
    for lines in (1, 30):
        tab.question.fill("字\n" * lines)
        for width, height in SIZES:
            tab.page.set_viewport_size({"width": width, "height": height})
            for element in (tab.question, tab.send, tab.page.locator("#fresh")):
                expect(element).to_be_in_viewport(ratio=1)
            page = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
            assert tab.page.evaluate(page) == [width, height]
            assert tab.page.locator("#log").bounding_box()["height"] >= 100
            tab.slid()
            for panel in 2 * ["#settings"] + 2 * ["#roles"]:  # opened and closed by a button that lies under nothing
                tab.page.locator(f"{panel} .toggle-button").click()
            tab.slid()
            tab.page.locator("#fresh").click(trial=True)
            left = "(one) => Math.round(document.querySelector(one).getBoundingClientRect().left)"
            assert len({tab.page.evaluate(left, one) for one in ("#top", ".message-wrap", "#question")}) == 1
    for viewport in (DESKTOP, PHONE):
        tab.page.set_viewport_size(viewport)
        tab.reload()
        tab.settings("采样" if chinese else "Sampling", "说过的话" if chinese else "What was said")
        for number in (0, 1):
            tab.page.locator("#settings input[type=checkbox]").nth(number).check()
        seen.append(tab.page.locator("#settings").inner_text())
        check(tab)
        tab.settings()
        tab.ask("你是谁？")
        expect(tab.page.locator("#words .textfield")).to_be_visible()
        check(tab)
        edit_or_cancel = tab.page.locator("#log .message-buttons-left button").last
        edit_or_cancel.click()
        tab.field.fill("字\n" * 8)  # it grows with its text
        assert tab.field.evaluate("(field) => field.scrollHeight <= field.clientHeight")
        check(tab)
        edit_or_cancel.click()
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


def test_signed_in_behind_a_proxy_over_a_restart(browser, serve, speaker, tmp_path):
    """As nginx's `location /chat/ { proxy_pass http://…/; proxy_set_header Host $http_host; }`.

    The server is restarted in mid-answer, with the path alone for the whole address, and nothing is lost.
    """
    (tmp_path / "auth").write_bytes(b"\xef\xbb\xbfanna:sec:ret\r\n")  # a file of Windows
    port = free_port()
    account = ["--auth_file", str(tmp_path / "auth")]
    server = serve(*account, "--root_path", f"http://roles.localhost:{port}/chat/")

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

    def sign_in(*passwords):
        for password in passwords:
            tab.page.get_by_label("username").fill("anna")
            tab.page.get_by_label("password").fill(password)
            tab.page.get_by_role("button", name="Login").click()
            if password == "wrong":
                expect(tab.page.get_by_text("Incorrect")).to_be_visible()
        tab.ready()

    tab = Tab(browser)
    try:
        assert httpx.get(f"{server.url}/config").status_code == 401 and "warning" not in server.log
        tab.page.goto(f"http://roles.localhost:{port}/chat/")
        expect(tab.page.get_by_label("username")).to_be_visible()
        check(tab)
        sign_in("wrong", "sec:ret")
        icon = tab.page.locator("link[rel=icon]")
        assert icon.evaluate("(icon) => icon.href") == f"http://roles.localhost:{port}/chat/favicon.ico"
        first = tab.ask("你是谁？")
        assert first == expected(speaker, "你是谁？")
        tab.longest(1500)
        tab.begin("你好。")
        server.close()
        tab.question.fill("再说一遍。")
        names = ["--root_path", "chat/", "--allowed_hosts", "http://ROLES.localhost:1/"]
        server = serve(*account, *names, port=server.port)
        sign_in("sec:ret")  # the page loads itself anew
        expect(tab.question).to_have_value("再说一遍。")
        expect(tab.questions).to_have_text(["你是谁？", "你好。"])
        assert squeezed(tab.bubbles.nth(1).inner_text()) == first and tab.answer()
        expect(tab.options.last).to_have_text("Stopped. Continue")
        tab.longest(8)
        server.close()
        server = serve(*account, *names, port=server.port)
        tab.question.press("Enter")
        sign_in("sec:ret")
        expect(tab.question).to_have_value("再说一遍。")
        tab.ask("再说一遍。")
    finally:
        tab.context.close()
        proxy.should_exit = True
        server.close()
        thread.join(30)
    assert tab.elsewhere == [] and "Traceback" not in server.log


def test_a_page_outlives_its_server(browser, serve, tmp_path):
    """It stands open while the server is restarted, once with its roles in another order, and whatever is done next works."""
    roles = json.loads(DESC_PATH.read_text(encoding="utf-8"))
    (tmp_path / "desc.json").write_text(json.dumps(dict(reversed(roles.items()))))
    server = serve()
    tab = Tab(browser, server.url)
    first = tab.ask("你是谁？")
    tab.page.locator("#fresh").click()
    expect(tab.questions).to_have_count(0)
    for act in ("ask", "role", "chat"):
        server.close()
        server = serve(*["--desc_path", str(tmp_path / "desc.json")] * (act == "role"), port=server.port)
        if act == "ask":
            tab.ask("再说一遍。")
        elif act == "role":
            tab.role("李白")
            tab.role(FIRST)
            expect(tab.chats).to_have_value("2. 再说一遍。")
        else:
            tab.chats.click()
            tab.page.get_by_role("option", name="1. 你是谁？").click()
            expect(tab.questions).to_have_text(["你是谁？"])
            assert tab.answer() == first
        assert "Traceback" not in server.log
    tab.close()
    server.close()


# ---------------------------------------------------------------- without a browser


def test_many_visitors_at_once_get_their_own_answers(server, speaker):
    """tests/tools/load_chat.py is the larger one, with times and memory."""
    waits, conversations = load_chat.run(server.url, visitors=8, questions=2, tokens=8)
    assert len(waits) == 16
    for seed, kept in enumerate(conversations):
        asked = []
        for turn in kept["chats"][FIRST][0]["turns"]:
            messages = conversation(*asked, turn["question"], role=FIRST, description=CHARACTERS[FIRST]["description"])
            settings = greedy(8, do_sample=True, seed=seed, temperature=2.0, top_p=1.0, top_k=0)
            assert [version["text"] for version in turn["versions"]] == [whole(speaker.stream(messages, settings))]
            asked += [turn["question"], turn["versions"][0]["text"]]


def test_nothing_phones_home_and_strange_names_are_refused(server):
    """Runs last in this file: whatever was sent above and is here leaves the log clean."""
    for host in ("localhost", "LOCALHOST", "[::1]", "evil.example", "192.0.2.1"):
        answer = httpx.get(server.url, headers={"host": f"{host}:{server.port}"})
        assert answer.status_code == (400 if host in ("evil.example", "192.0.2.1") else 200), host
    assert "<svg" in httpx.get(f"{server.url}/favicon.ico").text
    assert httpx.post(f"{server.url}/gradio_api/upload", files={"files": b"x"}).status_code == 413
    assert "Traceback" not in server.log, server.log
    addresses = server.log_path.with_name("connections").read_text().splitlines()
    assert addresses and all("127.0.0.1" in address or address in ("'localhost'", "None") for address in addresses)
