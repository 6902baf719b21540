"""The pages for readers: links lead somewhere, named functions exist, both languages say the same commands."""

import re

import pytest
from conftest import ROOT

PAGES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/README*.md")])
ENGLISH = [page for page in PAGES if page.with_name(f"{page.stem}_zh.md").exists()]


def commands(page) -> list[str]:
    """The lines of a page's code blocks that can be run, without their comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(\$ )?(python3|deepspeed|make|pip|CUDA_|NCCL_|vllm |llama-)", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.name)
def test_both_languages_have_the_same_outline_and_commands(page):
    chinese = page.with_name(f"{page.stem}_zh.md")
    outlines = [re.findall(r"^#+ ", text.read_text(encoding="utf-8"), re.MULTILINE) for text in (page, chinese)]
    assert outlines[0] == outlines[1]
    assert commands(page) == commands(chinese)
    for text in (page, chinese):  # a command outside of the fences would not be compared
        fences = re.split(r"^```.*\n", text.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert not re.search(r"^    (python3|deepspeed|--)", "".join(fences[::2]), re.MULTILINE)


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_readme_is_short_and_names_functions_that_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    table = text.split("|---|---|\n")[1].split("\n\n")[0]
    for label, path in re.findall(r"\[([^]]+)\]\(([^)]+\.py)\)", table):
        code = (ROOT / path).read_text(encoding="utf-8")
        for function in re.findall(r"`(\w+)`", label):
            assert re.search(rf"(def|class) {function}\b", code), f"{path} has no {function}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_installation_lines_are_pinned(page):
    for line in commands(page):
        if line.startswith("pip install -r"):
            assert re.fullmatch(r"pip install -r requirements(-4bit)?\.txt -c constraints\.txt", line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_files_that_exist(page):
    for line in commands(page):
        for script in re.findall(r"python3 ([\w/]+\.py)", line):
            assert (ROOT / script).exists() or script.startswith("convert_hf"), line
        for module in re.findall(r"python3 -m ([\w.]+)", line):
            assert module == "venv" or (ROOT / f"{module.replace('.', '/')}.py").exists(), line
