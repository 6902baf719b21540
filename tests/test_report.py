"""The report is one file that a browser reads alone, whatever stands in the answers."""

from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np

from baichuan.generation_utils import Answer
from support import report
from support.answer_scores import measure_answers
from support.tables import Section
from support.voice import Recall

EVIL = '<img src="http://example.org/x.png"><script>alert(1)</script>&lt;"\''
VOID = {"meta", "rect"}


class Reader(HTMLParser):
    """Tags with their attributes, the text, and whether every element is closed."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


def write(path, texts: dict[str, list[str]], pictures=(), sections=()) -> Reader:
    questions = [
        SimpleNamespace(
            role=f"角色{n % 2}", system="", prompt=f"问{n}{EVIL}", kind="general", references=[f"甲{n}乙", EVIL]
        )
        for n in range(len(next(iter(texts.values()))))
    ]
    answers = {name: [Answer(text, n % 2 == 0) for n, text in enumerate(own)] for name, own in texts.items()}
    recall = Recall({"角色0": ["甲0乙"]})
    measured = {name: measure_answers(questions, own, None, recall) for name, own in answers.items()}
    report.write(path, sections, [f"remark {EVIL}"], questions, answers, measured, pictures)
    return Reader(path.read_text(encoding="utf-8"))


def test_everything_is_escaped_and_nothing_is_loaded(tmp_path):
    roles = ["李白", EVIL]
    picture = report.Picture(EVIL, roles, np.array([[0.9, 0.1], [np.nan, np.nan]]), EVIL)
    section = Section(EVIL, [["role", "", EVIL], [EVIL, EVIL, f"1.0 [{EVIL}]"]], EVIL)
    page = write(tmp_path / "report.html", {EVIL: [EVIL, "甲"], "tuned": ["乙", ""]}, [picture], [section])
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "a", "base"}
    for _, attributes in page.tags:
        assert not attributes.keys() & {"src", "href", "srcset", "data", "action", "onclick", "onload"}
    style = (tmp_path / "report.html").read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")
    assert page.text.count(EVIL) > 10
    assert [attributes["fill-opacity"] for tag, attributes in page.tags if tag == "rect"] == [
        "0.91",
        "0.15",
        "0.06",
        "0.06",
    ]
    assert "李白 → 李白: 90 %" in page.text and "–" in page.text


def test_the_best_and_the_worst_answers_of_the_last_model_stand_beside_the_others(tmp_path):
    """Of 20 answers, number n has n of 19 characters of the recorded one, so the order is known."""
    recorded = "子丑寅卯辰巳午未申酉戌亥甲乙丙丁戊己庚"
    questions = [
        SimpleNamespace(role="李白", system="", prompt=f"问题{n}。", kind="", references=[" ".join(recorded)])
        for n in range(20)
    ]
    tuned = [Answer(" ".join(recorded[:n]), True) for n in range(20)]
    answers = {"base": [Answer(f"原{n}。", False) for n in range(20)], "tuned": tuned}
    measured = {name: measure_answers(questions, own, None, None) for name, own in answers.items()}
    report.write(tmp_path / "report.html", [], [], questions, answers, measured)
    text = Reader((tmp_path / "report.html").read_text(encoding="utf-8")).text
    best, worst = text.split("The worst answers of tuned")
    worst, rest = worst.split("All answers")
    asked = [[int(line[2:-1]) for line in part.split("\n") if line.startswith("问题")] for part in (best, worst, rest)]
    assert asked == [list(range(19, 11, -1)), list(range(8)), list(range(20))]
    assert [line for line in best.split("\n") if line.startswith("原")] == [f"原{n}。" for n in asked[0]]
    assert "cut off" in best and "ROUGE-L 100" in best and "(nothing)" in worst


def test_a_single_answer_is_neither_best_nor_worst(tmp_path):
    page = write(tmp_path / "report.html", {"model": ["甲0乙"]})
    assert "best" not in page.text and "All answers" in page.text
    assert "100 % copied" in page.text and "training answer" in page.text
