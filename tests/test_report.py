"""The report is one file that a browser reads alone, whatever stands in the answers."""

from html.parser import HTMLParser

import numpy as np
import pytest

from predict import Question
from support.model.answering import Answer
from support.scores import report
from support.scores.answers import MeasuredAnswers, measure_answers, recorded_limits
from support.scores.persona import Readings
from support.scores.table import Items, Score, compare, in_a_sentence, texts
from support.scores.voice import Recall

EVIL = '<img src="http://example.org/x.png"><script>alert(1)</script>&lt;"\''
VOID = {"meta", "input", "path", "circle"}


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


def question(role: str, prompt: str, references: list[str], kind=None) -> Question:
    return Question(role, "", prompt, kind, None, references, [{"role": "user", "content": prompt}])


def write(path, own: dict[str, list[str]], language="en", evil=EVIL, heard=None, kind="general") -> Reader:
    """Two roles in turn; of each question the recorded answers are 甲n乙 and something evil."""
    count, text = len(next(iter(own.values()))), texts(language)
    roles = [f"角色{n % 2}{evil}" for n in range(count)]
    questions = [question(role, f"问{n}{evil}", [f"甲{n}乙", evil or "无"], kind) for n, role in enumerate(roles)]
    recall = Recall({f"角色0{evil}": ["甲0乙"]})
    limits = recorded_limits(questions, None, recall)
    answers = {name: [Answer(said, n % 2 == 0) for n, said in enumerate(texts)] for name, texts in own.items()}
    measured = {name: measure_answers(questions, texts, None, recall, limits) for name, texts in answers.items()}
    scores, names = {name: one.scores for name, one in measured.items()}, list(own)
    rows = compare(scores, 20, 1)
    by_role = {role: compare(scores, 20, 1, "role", role) for role in roles[:2]}
    sentences = in_a_sentence(rows, names, text)
    shown = {"sentences": sentences, "remarks": [f"remark {evil}"], "rows": rows, "by_role": by_role}
    report.write(path, language, questions, measured, **shown, heard=heard or {})
    return Reader(path.read_text(encoding="utf-8"))


def said(roles: list[str]) -> Readings:
    """Of the first role two answers, one of which is heard as the second's; of the second none."""
    nats = np.array([[-1.0, -2.0], [-2.0, -1.0]])
    items = Items.of([{"role": roles[0]}] * 2, range(2))
    return Readings(roles, items, np.array([[True, False]] * 2), np.arange(2), np.ones(2), nats, np.zeros(2))


def test_everything_is_escaped_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "report.html"
    page = write(path, {EVIL: [EVIL, "甲"], "tuned": ["乙", ""]}, heard={EVIL: said(["李白", EVIL])}, kind=EVIL)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "a", "base", "form"}
    for _, attributes in page.tags:
        assert not attributes.keys() & {"src", "href", "srcset", "data", "action", "onclick", "onload"}
    style = path.read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "light dark" in style
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")
    assert page.text.count(EVIL) > 15
    shares = [attributes["style"] for tag, attributes in page.tags if attributes.get("class") == "share"]
    assert shares == ["--share: 50%", "--share: 50%"]


def test_the_picture_points_right_where_it_is_better(tmp_path):
    """ROUGE-L rises, and so do copies: one is better, the other worse."""
    items = Items.of([{}] * 6, range(6))
    rise = {name: [Score(items, np.full(6, value)) for value in (20.0, 60.0)] for name in ("rouge_l", "copies")}
    models = {name: {measure: own[n] for measure, own in rise.items()} for n, name in enumerate(("base", "tuned"))}
    measured = {name: MeasuredAnswers([Answer("答", True)] * 6, own, None, None) for name, own in models.items()}
    path = tmp_path / "report.html"
    report.write(path, "en", [question("甲", "问", ["答"])] * 6, measured, rows=compare(models, 20, 1), by_role={})
    page = Reader(path.read_text(encoding="utf-8"))
    circles = [float(attributes["cx"]) for tag, attributes in page.tags if tag == "circle"]
    classes = [attributes["class"] for tag, attributes in page.tags if tag == "g"]
    assert classes == ["before", "better", "before", "worse"]
    assert circles[0] < circles[1] and circles[2] > circles[3]
    assert circles[1] - circles[0] == pytest.approx(0.4 * 350 * 0.9)  # of 350 pixels less the margins
    assert "20.0 → 60.0   +40.0 [+40.0, +40.0] better" in page.text and "[+40.0, +40.0] worse" in page.text


def test_several_models_have_a_lane_each_and_one_has_no_arrow(tmp_path):
    page = write(tmp_path / "three.html", {"base": ["甲", "乙"], "one": ["甲", "乙"], "two": ["甲", "乙"]}, evil="")
    lanes = [tag for tag, attributes in page.tags if tag == "g"]
    drawn = sum(attributes.get("class") in ("name", "more") for tag, attributes in page.tags if tag == "text")
    rows = page.text.count("recorded answer: ROUGE-L, %\n")
    assert rows == 2 and len(lanes) == 4 * drawn and "\n1   " in page.text and "\n2   " in page.text
    alone = write(tmp_path / "one.html", {"model": ["甲", "乙"]}, language="zh", evil="")
    assert "→" not in alone.text.split("回答对照")[0] and "加上 --baseline_path" in alone.text
    assert ("html", {"lang": "zh"}) in alone.tags and "训练改变了什么？" in alone.text


def test_the_best_and_the_worst_answers_of_the_last_model_come_first(tmp_path):
    """Of 20 answers, number n has n of 19 characters of the recorded one, so the order is known."""
    recorded = "子丑寅卯辰巳午未申酉戌亥甲乙丙丁戊己庚"
    questions = [question(f"角色{n % 3}", f"问题{n}。", [" ".join(recorded)]) for n in range(20)]
    tuned = [Answer(" ".join(recorded[:n]), True) for n in range(20)]
    answers = {"base": [Answer(f"原{n}。", False) for n in range(20)], "tuned": tuned}
    measured = {name: measure_answers(questions, own, None, None, {}) for name, own in answers.items()}
    rows = compare({name: own.scores for name, own in measured.items()}, 5, 1)
    report.write(tmp_path / "report.html", "en", questions, measured, rows=rows, by_role={})
    page = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    best, worst = page.text.split("The worst answers of tuned")
    worst, rest = worst.split("All other answers: 4")
    asked = [[int(line[2:-1]) for line in part.split("\n") if line.startswith("问题")] for part in (best, worst, rest)]
    assert asked == [list(range(19, 11, -1)), list(range(8)), list(range(8, 12))]
    assert [line for line in best.split("\n") if line.startswith("原")] == [f"原{n}。" for n in asked[0]]
    assert "cut off" in best and "ROUGE-L 100" in best and "(nothing)" in worst
    # A button for each role hides the cards of the others.
    buttons = [attributes["id"] for tag, attributes in page.tags if tag == "input"]
    assert buttons == ["every", "role0", "role1", "role2"]
    assert [attributes["class"] for tag, attributes in page.tags if tag == "article"][:3] == ["role1", "role0", "role2"]


def test_a_single_answer_is_neither_best_nor_worst(tmp_path):
    page = write(tmp_path / "report.html", {"model": ["甲0乙"]}, evil="")
    assert "best" not in page.text and "All other answers: 1" in page.text
    assert "100 % copied" in page.text and "training answer" in page.text
