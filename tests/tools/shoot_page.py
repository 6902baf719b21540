"""Pictures of the chat page for the README: images/6_2.png (desktop), 6_2_phone.png, 6_2_dark.png and 6_2_begin.png.

python3 tests/tools/shoot_page.py --model_path output_dir/demo/Baichuan2-tiny \\
    --adapter_path output_dir/demo/run/epoch-30-step-180
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from playwright.sync_api import expect, sync_playwright
from web_client import ROOT, Server

from support.command_line import ArgumentParser
from support.errors import UserError, entry_point

QUESTIONS = ["你一个筋斗能翻多远？"]


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", default="output_dir/demo/merged", help="model to serve")
    parser.add_argument("--adapter_path", help="adapter to serve; 6_2_dark.png then shows the base model's answers too")
    parser.add_argument("--images", type=Path, default=ROOT / "images", help="directory of the pictures")
    parser.add_argument("--language", default="zh-CN", help="the browser's language")
    parser.add_argument("--questions", nargs="+", default=QUESTIONS, help="what 孙悟空 is asked")
    return parser.parse_args(argv)


def shoot(browser, args, url: str, name: str, width: int, height: int, scheme="light", both=False, asked=True):
    viewport = {"width": width, "height": height}
    context = browser.new_context(locale=args.language, viewport=viewport, color_scheme=scheme, device_scale_factor=1)
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
    for question in args.questions if asked else []:
        page.locator("#question textarea").fill(question)
        page.locator("#question textarea").press("Enter")
        expect(page.locator("#question .stop-button")).to_be_visible()
        expect(page.locator("#question .submit-button")).to_be_visible(timeout=60_000)
    if both:
        expect(page.locator("#words .textfield")).to_be_visible(timeout=60_000)
    page.mouse.move(0, 0)
    page.wait_for_timeout(700)  # panels slide and fade
    page.screenshot(path=args.images / name)
    context.close()


@entry_point
def main(argv=None):
    args = parse_args(argv)
    chromium = shutil.which("chromium")
    if chromium is None:
        raise UserError("chromium is not there: apt-get install chromium fonts-noto-cjk")
    args.images.mkdir(exist_ok=True)
    flags = ["--adapter_path", args.adapter_path] if args.adapter_path else []
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        server = Server(Path(directory) / "log", args.model_path, *flags)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        try:
            shoot(browser, args, server.url, "6_2.png", 1280, 820)
            shoot(browser, args, server.url, "6_2_phone.png", 390, 780)
            shoot(browser, args, server.url, "6_2_dark.png", 1280, 820, scheme="dark", both=bool(args.adapter_path))
            shoot(browser, args, server.url, "6_2_begin.png", 820, 1180, asked=False)
        finally:
            browser.close()
            server.close()


if __name__ == "__main__":
    main()
