"""The chat page in Chromium, as people use it, on a small random model with an adapter."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import NO_CHROMIUM
from playwright.sync_api import Error, expect, sync_playwright
from test_web_demo import adapter, conversation, greedy, whole  # noqa: F401 (a fixture)
from web_client import DESC_PATH, FORM, Server, squeezed

from data_helper import read_profiles
from support.speaker import Speaker

DESCRIPTIONS = read_profiles(DESC_PATH)
FIRST = next(iter(DESCRIPTIONS))
expect.set_options(timeout=60_000)  # a slow machine is no fault of the page; waits end as soon as they can
DESKTOP, PHONE = {"width": 1280, "height": 820}, {"width": 390, "height": 780}


@pytest.fixture(scope="module")
def server(checkpoint, adapter, tmp_path_factory):  # noqa: F811
    server = Server(tmp_path_factory.mktemp("server") / "log", checkpoint, "--adapter_path", adapter)
    yield server
    server.close()
    assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="module")
def speaker(checkpoint, adapter):  # noqa: F811
    return Speaker.load(checkpoint, adapter, torch.device("cpu"))


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
    """One browser tab on the page, opened in its initial state; greedy answers of 16 tokens unless set otherwise."""

    def __init__(self, browser, url, language="en-US", viewport=DESKTOP, greedy=True):
        self.context = browser.new_context(locale=language, viewport=viewport, accept_downloads=True)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.elsewhere, self.dialogs, self.errors = [], [], []
        self.page.on("request", lambda r: r.url.startswith((url, "data:", "blob:")) or self.elsewhere.append(r.url))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.question = self.page.locator("#question textarea")
        self.answers = self.page.locator("#chat .bot.message")
        self.questions = self.page.locator("#chat .user.message")
        self.note = self.page.locator("#note")
        self.send = self.page.locator("#question button.submit-button")
        self.stop = self.page.locator("#question button.stop-button")
        expect(self.question).to_be_visible()
        expect(self.send).to_be_visible()
        if greedy:
            self.page.get_by_label(re.compile("Sampling|随机采样")).uncheck()
            self.set("max_new_tokens", 16)

    def set(self, name: str, value):
        index = [name for name in FORM if name not in ("role", "description", "compare", "do_sample", "seed")].index(
            name
        )
        number = self.page.locator(".sidebar input[type=number]").nth(index)
        number.fill(str(value))
        number.press("Tab")

    def ask(self, text: str, count: int):
        """Ask, and wait for the end of answer number `count`."""
        self.question.fill(text)
        self.question.press("Enter")
        self.finished(count)

    def begin_anew(self):
        self.page.get_by_role("button", name="New chat").click()
        expect(self.questions).to_have_count(0)

    def finished(self, count: int):
        expect(self.answers).to_have_count(count)
        expect(self.send).to_be_visible()

    def answer(self, number: int = -1) -> str:
        return squeezed(self.answers.nth(number).inner_text())

    def close(self):
        self.context.close()
        assert self.elsewhere == [] and self.dialogs == [] and self.errors == []


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


def expected(speaker, *turns, role=FIRST, description=None, tokens=16, **kwargs):
    messages = conversation(*turns, role=role, description=description or DESCRIPTIONS[role])
    return whole(speaker.answer(messages, greedy(tokens), **kwargs))


def test_a_conversation(tab, speaker):
    """Choose a role, ask, ask a follow-up that is answered in the light of the first turn, clear."""
    tab.page.locator("#bar input").click()
    tab.page.get_by_role("option", name="李白").click()
    expect(tab.page.locator(".sidebar textarea")).to_have_value(DESCRIPTIONS["李白"])
    tab.ask("你是谁？", 1)
    first = expected(speaker, "你是谁？", role="李白")
    assert tab.answer() == squeezed(first)
    tab.ask("再说一遍。", 2)
    assert tab.answer() == squeezed(expected(speaker, "你是谁？", first, "再说一遍。", role="李白"))
    assert tab.answer() != squeezed(expected(speaker, "再说一遍。", role="李白"))
    tab.begin_anew()
    tab.ask("再说一遍。", 1)
    assert tab.answer() == squeezed(expected(speaker, "再说一遍。", role="李白"))


def test_an_answer_grows_and_can_be_stopped(tab):
    tab.set("max_new_tokens", 2000)
    tab.question.fill("你是谁？")
    tab.question.press("Enter")
    expect(tab.stop).to_be_visible()
    lengths = "() => document.querySelector('#chat .bot.message')?.innerText.length ?? 0"
    tab.page.wait_for_function(f"({lengths})() > 0")
    short = tab.page.evaluate(lengths)
    tab.page.wait_for_function(f"({lengths})() > {short} + 20")
    tab.stop.click()
    tab.finished(1)
    stopped = tab.answer()
    tab.set("max_new_tokens", 16)
    tab.ask("再说一遍。", 2)  # the model is free at once
    assert tab.answer(0).startswith(stopped) and len(tab.answer()) < len(stopped) < 8000  # one update may be under way


def test_a_second_question_waits_for_the_first_answer(tab):
    tab.set("max_new_tokens", 2000)
    tab.question.fill("你是谁？")
    tab.question.press("Enter")
    expect(tab.stop).to_be_visible()
    tab.question.fill("再说一遍。")
    tab.question.press("Enter")
    expect(tab.page.get_by_text("still being written")).to_be_visible()
    expect(tab.question).to_have_value("再说一遍。")  # it is not lost
    tab.stop.click()
    expect(tab.send).to_be_visible()


def test_a_new_chat_while_an_answer_is_written(tab, speaker):
    tab.set("max_new_tokens", 2000)
    tab.question.fill("你是谁？")
    tab.question.press("Enter")
    expect(tab.answers).to_have_count(1)
    tab.begin_anew()
    tab.set("max_new_tokens", 16)
    tab.ask("再说一遍。", 1)
    assert tab.answer() == squeezed(expected(speaker, "再说一遍。"))


def test_retry_undo_edit_copy_clear(tab, speaker):
    tab.page.get_by_label("Sampling").check()
    tab.set("temperature", 2)
    tab.set("top_k", 0)
    tab.set("top_p", 1)
    tab.ask("你是谁？", 1)
    first = tab.answers.first.inner_text()
    tab.page.get_by_label("Retry").click()
    expect(tab.answers.first).not_to_have_text(first)
    tab.finished(1)
    tab.page.get_by_label("Sampling").uncheck()
    tab.page.get_by_label("Retry").click()
    expect(tab.note).to_contain_text("the same question gets the same answer")
    tab.finished(1)

    tab.page.get_by_label("Edit").click()
    tab.page.locator("#chat textarea").fill("你好。")
    tab.page.get_by_label("Submit").first.click()
    expect(tab.note).to_be_empty()  # the server has it; the window shows the new text before
    expect(tab.questions.first).to_have_text("你好。")
    tab.finished(1)
    assert tab.answer() == squeezed(expected(speaker, "你好。"))

    tab.page.get_by_label("Copy message").first.click()
    assert tab.page.evaluate("navigator.clipboard.readText()") == "你好。"

    tab.page.get_by_role("button", name="Undo").click()
    expect(tab.questions).to_have_count(0)
    expect(tab.question).to_have_value("你好。")
    tab.ask("你好。", 1)
    tab.page.get_by_label("Clear").click()
    expect(tab.questions).to_have_count(0)


def test_the_description_and_new_roles(tab, speaker):
    description = tab.page.locator(".sidebar textarea")
    tab.ask("你是谁？", 1)
    description.fill("一块石头")
    tab.begin_anew()
    tab.ask("你是谁？", 1)
    assert tab.answer() == squeezed(expected(speaker, "你是谁？", description="一块石头"))

    role = tab.page.locator("#bar input")
    role.fill("曹操")
    role.press("Enter")
    expect(tab.note).to_contain_text("a new conversation")
    expect(tab.answers).to_have_count(0)
    expect(description).to_have_value("")
    tab.question.fill("你是谁？")
    tab.question.press("Enter")
    expect(tab.page.get_by_text("Who the role is: please write something")).to_be_visible()
    description.fill("枭雄")
    tab.ask("你是谁？", 1)
    assert tab.answer() == squeezed(expected(speaker, "你是谁？", role="曹操", description="枭雄"))


def test_examples_of_each_role(tab):
    examples = tab.page.locator("#chat button.example")
    expect(examples).to_have_count(4)
    of_first = examples.all_inner_texts()
    tab.page.locator("#bar input").click()
    tab.page.get_by_role("option", name="张飞").click()
    expect(examples.first).not_to_have_text(of_first[0])
    text = examples.first.inner_text()
    examples.first.click()
    tab.finished(1)
    expect(tab.questions.first).to_have_text(text.strip())


def test_settings_act_on_the_next_answer(tab, speaker):
    tab.set("max_new_tokens", 3)
    tab.ask("你是谁？", 1)
    assert tab.answer() == squeezed(expected(speaker, "你是谁？", tokens=3))
    tab.begin_anew()
    tab.page.get_by_label("Sampling").check()
    tab.set("max_new_tokens", 16)
    tab.set("temperature", 1.5)
    tab.set("top_k", 50)
    seed = tab.page.get_by_label("Seed")
    expect(seed).to_have_value("-1")  # a random one, unless
    seed.fill("7")
    tab.ask("你是谁？", 1)
    settings = greedy(16, do_sample=True, temperature=1.5, top_p=0.85, top_k=50, seed=7)
    messages = conversation("你是谁？", role=FIRST, description=DESCRIPTIONS[FIRST])
    assert tab.answer() == squeezed(whole(speaker.answer(messages, settings)))


def test_before_and_after_side_by_side(tab, speaker):
    tab.page.get_by_label("Base model's answer beside it").check()
    base = tab.page.locator("#base_chat .bot.message")
    tab.ask("你是谁？", 1)
    expect(base).to_have_count(1)
    assert tab.answer() == squeezed(expected(speaker, "你是谁？"))
    assert squeezed(base.inner_text()) == squeezed(expected(speaker, "你是谁？", base=True)) != tab.answer()
    left, right = tab.page.locator("#chat").bounding_box(), tab.page.locator("#base_chat").bounding_box()
    assert left["x"] + left["width"] <= right["x"] and left["y"] == right["y"]


def test_download(tab, speaker):
    tab.ask("你是谁？", 1)
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Download").click()
    lines = [json.loads(line) for line in download.value.path().read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == [
        "你是谁？"
    ] and download.value.suggested_filename == "conversation.jsonl"
    assert lines[0]["response"] == expected(speaker, "你是谁？")


def test_input_methods_do_not_send_half_a_word(tab):
    """An Enter during a composition belongs to the input method; the next one sends."""
    tab.question.click()
    devtools = tab.context.new_cdp_session(tab.page)
    devtools.send("Input.imeSetComposition", {"text": "ni hao", "selectionStart": 6, "selectionEnd": 6})
    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
    devtools.send("Input.dispatchKeyEvent", key | {"type": "rawKeyDown"})
    devtools.send("Input.dispatchKeyEvent", key | {"type": "keyUp"})
    composing = """() => document.querySelector("#question textarea").dispatchEvent(
        new KeyboardEvent("keydown", {key: "Enter", isComposing: true, bubbles: true, cancelable: true}))"""
    tab.page.evaluate(composing)
    devtools.send("Input.insertText", {"text": "你好"})
    expect(tab.question).to_have_value("你好")
    expect(tab.questions).to_have_count(0)
    tab.question.press("Enter")
    tab.finished(1)
    expect(tab.questions).to_have_count(1)  # nothing had been sent before
    expect(tab.questions.first).to_have_text("你好")


def test_shift_enter_makes_a_line(tab):
    tab.question.fill("一")
    tab.question.press("Shift+Enter")
    tab.question.press_sequentially("二")
    expect(tab.question).to_have_value("一\n二")


SCRIPT = (
    "<script>alert(1)</script><img src=x onerror=alert(1)> ![](http://192.0.2.1/a.png) [b](javascript:alert(1)) **c**"
)


def test_nothing_in_a_text_is_executed_or_fetched(tab):
    role = tab.page.locator("#bar input")
    role.fill(SCRIPT[:40])
    role.press("Enter")
    expect(tab.page.locator(".sidebar textarea")).to_have_value("")
    tab.page.locator(".sidebar textarea").fill(SCRIPT)
    tab.ask(SCRIPT, 1)
    expect(tab.questions.first).to_have_text(SCRIPT.replace("<", "<\u2060"))
    assert tab.page.locator("#chat .message :is(img, script, a)").count() == 0
    assert tab.page.evaluate("fetch('http://192.0.2.1/').then(() => 'sent', () => 'kept')") == "kept"
    tab.elsewhere.clear()  # the fetch above, which the page's policy has kept from leaving


def test_a_question_that_is_too_long_gets_a_message(tab):
    tab.question.fill("字" * 7000)
    tab.question.press("Enter")
    expect(tab.page.get_by_text("leaves no room for a reply")).to_be_visible()
    tab.question.fill("字" * 1_000_000)
    tab.question.press("Enter")
    expect(tab.page.get_by_text("1,000,000 characters")).to_be_visible()
    tab.set("max_new_tokens", 2048)
    tab.question.fill("字" * 3500)
    tab.question.press("Enter")
    expect(tab.note).to_contain_text("it is cut there")


def test_two_people_at_once(open_tab, speaker):
    """The second sees a place in the queue, and both get their own answers."""
    one, other = open_tab(), open_tab()
    one.set("max_new_tokens", 2000)
    one.question.fill("你是谁？")
    one.question.press("Enter")
    expect(one.answers).to_have_count(1)
    other.question.fill("再说一遍。")
    other.question.press("Enter")
    expect(other.note.locator("..")).to_contain_text(re.compile("queue: 1/1"))
    one.stop.click()
    other.finished(1)
    assert other.answer() == squeezed(expected(speaker, "再说一遍。"))
    expect(one.questions).to_have_count(1)


def test_chinese_on_a_phone(open_tab, speaker):
    tab = open_tab("zh-CN", PHONE, greedy=False)
    expect(tab.question).to_have_attribute("placeholder", "说点什么，按回车发送")
    expect(tab.page.locator("#stand_in")).to_contain_text("替身模型")
    expect(tab.page.locator(".sidebar")).not_to_be_in_viewport()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for element in (tab.question, tab.send, tab.page.locator("#bar input")):
        expect(element).to_be_in_viewport(ratio=1)
    tab.question.fill("\u0007")
    tab.question.press("Enter")
    expect(tab.page.get_by_text("含有控制字符")).to_be_visible()
    tab.page.locator(".toast-close").click()  # it would lie over the sidebar's button for ten seconds
    tab.page.locator(".sidebar .toggle-button").click()
    tab.page.get_by_label("随机采样").uncheck()
    tab.set("max_new_tokens", 16)
    tab.page.locator(".sidebar .toggle-button").click()
    tab.ask("你是谁？", 1)
    assert tab.answer() == squeezed(expected(speaker, "你是谁？"))
