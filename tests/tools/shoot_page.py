"""Pictures of the chat page for the README: images/6_2.png (desktop), 6_2_phone.png, 6_2_dark.png and 6_2_begin.png.

python3 tests/tools/shoot_page.py       # after `make demo CHECK=1`
"""

import shutil
import sys
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from playwright.sync_api import expect, sync_playwright
from web_client import ROOT, Server

DEMO = ROOT / "output_dir/demo"
QUESTION = "你一个筋斗能翻多远？"


def shoot(browser, url: str, name: str, width: int, height: int, scheme="light", both=False, asked=True):
    viewport = {"width": width, "height": height}
    context = browser.new_context(locale="zh-CN", viewport=viewport, color_scheme=scheme, device_scale_factor=1)
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#log .bot")).to_have_count(1, timeout=60_000)
    page.locator("#settings .toggle-button").click()
    for number in (0, 1) if both else ():  # the base model's answers; the words coloured
        page.locator("#settings input[type=checkbox]").nth(number).check()
    page.locator("#settings .label-wrap").first.click()
    page.locator(
        "#settings .accordion input[type=checkbox], #settings .label-wrap ~ * input[type=checkbox]"
    ).last.uncheck()
    page.locator("#settings .toggle-button").click()
    if asked:
        page.locator("#question textarea").fill(QUESTION)
        page.locator("#question textarea").press("Enter")
        expect(page.locator("#question .stop-button")).to_be_visible()
        expect(page.locator("#question .submit-button")).to_be_visible(timeout=60_000)
    if both:
        expect(page.locator("#words .textfield")).to_be_visible(timeout=60_000)
    page.mouse.move(0, 0)
    page.wait_for_timeout(700)  # panels slide and fade
    page.screenshot(path=ROOT / "images" / name)
    context.close()


def main():
    adapter = ["--adapter_path", str(DEMO / "run/epoch-30-step-180")]
    with TemporaryDirectory() as directory, sync_playwright() as playwright:
        with closing(Server(Path(directory) / "log", str(DEMO / "Baichuan2-tiny"), *adapter)) as server:
            with playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"]) as browser:
                shoot(browser, server.url, "6_2.png", 1280, 820)
                shoot(browser, server.url, "6_2_phone.png", 390, 780)
                shoot(browser, server.url, "6_2_dark.png", 1280, 820, scheme="dark", both=True)
                shoot(browser, server.url, "6_2_begin.png", 820, 1180, asked=False)


if __name__ == "__main__":
    main()
