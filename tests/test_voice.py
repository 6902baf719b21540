"""Style and recall: by hand, at their ceiling and floor, and in the tables."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from baichuan.generation_utils import Answer
from data_helper import read_samples
from support.answer_scores import answer_sections, measure_answers, recall_items, style_limits
from support.voice import Recall, Style, longest_piece, read_training, recorded_answers


def question(role: str, *references: str, kind="general", system=""):
    messages = [{"role": "user", "content": f"与“{references[0]}”相配的问题？"}]
    return SimpleNamespace(role=role, system=system, messages=messages, kind=kind, references=list(references))


def answered(*texts: str) -> list[Answer]:
    return [Answer(text, True) for text in texts]


def test_longest_piece_against_all_pieces():
    draw = np.random.default_rng(0)
    for _ in range(200):
        answer, text = ("".join(draw.choice(list("甲乙丙"), size)) for size in (draw.integers(0, 12), 40))
        pieces = [answer[i:j] for i in range(len(answer)) for j in range(i + 1, len(answer) + 1)]
        found = longest_piece(answer, text)
        assert len(found) == max((len(piece) for piece in pieces if piece in text), default=0)
        assert found in answer and found in text


def test_recall_by_hand():
    recall = Recall({"李白": ["举杯邀明月，对影成三人。", "飞流直下三千尺"], "张飞": ["吃我一矛！"]})
    assert recall.nearest("李白", "我举杯邀明月") == (5 / 6, "举杯邀明月，对影成三人。")
    assert recall.nearest("李白", "飞流直下") == (1.0, "飞流直下三千尺")
    assert recall.nearest("李白", "三人。飞流") == (3 / 5, "举杯邀明月，对影成三人。")  # no piece goes over two answers
    assert (
        recall.nearest("李白", "吃我一矛！") == recall.nearest("谁", "举杯") == recall.nearest("李白", "") == (0.0, "")
    )


def test_scores_are_split_into_copies_and_others():
    """Two answers that copy, one of which is right, and two that do not, of which one is half right."""
    questions = [question("李白", text) for text in ("举杯邀明月", "花间一壶酒", "甲乙", "丙丁")]
    recall, style = Recall({"李白": ["举杯邀明月"]}), SimpleNamespace(roles_of=lambda texts: ["李白"] * len(texts))
    measured = measure_answers(questions, answered("举杯邀明月", "举杯邀明", "戊己", "举杯戊己庚"), style, recall)
    items = recall_items(questions, measured, np.zeros(4))
    assert items[:, 0].tolist() == [1, 1, 0, 0.4]
    assert items[:, 1].tolist() == [1, 1, 0, 0]
    assert items[0, 3] == pytest.approx(1, abs=1e-6) and items[1, 3] == 0 and np.isnan(items[2:, 3]).all()
    assert np.isnan(items[:2, 4]).all() and items[2:, 4].tolist() == [0, 0]
    assert np.nansum(items[:, 5]) == np.nansum(items[:, 6]) == 2
    (_, _, table) = answer_sections(questions, {"model": measured}, style, recall, 50, 1)
    assert table.rows[1][:3] == ["李白", "model", "4"] and table.rows[1][3].startswith("60.0 [")
    assert [text.split(" ")[0] for text in table.rows[1][4:7]] == [
        "50.0",
        "25.0",
        "50.0",
    ]  # one recorded answer is a copy
    assert "50 % or more" in table.note


def test_a_role_without_training_answers_has_no_recall_and_no_style(tmp_path):
    path = tmp_path / "train.json"
    lines = [
        {"role": role, "prompt": "问", "response": text} for role, text in (("李白", "举杯邀明月"), ("张飞", "哇呀呀"))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    style, recall, remarks = read_training(path, ["李白", "杜甫"])
    assert remarks == [f"--train_path {path}: has no answers of 杜甫: no style or recall for them."]
    questions = [question("李白", "举杯邀明月"), question("杜甫", "国破山河在")]
    measured = measure_answers(questions, answered("举杯", "举杯"), style, recall)
    for table in answer_sections(questions, {"model": measured}, style, recall, 20, 1)[1:]:
        rows = {row[0]: row[3:] for row in table.rows[1:]}
        assert rows["李白"][0].startswith("100.0 [") and set(rows["杜甫"]) == {"–"}
        assert rows["all"][0] == rows["李白"][0]
    path.write_text("")
    assert read_training(path, ["李白"])[:2] == (None, None)


def test_rounds_of_a_conversation_are_drawn_together():
    """Eight rounds that are alike are no more certain than one."""
    questions = [question("李白", text) for text in ("举杯", "明月", "金樽")] * 8
    measured = measure_answers(questions, answered(*("举杯", "明月", "无") * 8), None, None)
    (table,) = answer_sections(questions, {"model": measured}, None, None, 400, 1)
    value, interval = table.rows[1][3].split(" ", 1)
    assert value == "66.7" and interval == "[0.0, 100.0]"


# ---------------------------------------------------------------- style


@pytest.fixture(scope="module")
def recorded(samples) -> dict[str, list[str]]:
    return recorded_answers(samples[0])


@pytest.fixture(scope="module")
def questions(samples, recorded) -> list:
    """The recorded answers of the sample's test set; two of a role to one question are two questions here."""
    return [question(sample["role"], sample["response"]) for sample in read_samples(samples[1])]


def test_recorded_answers_are_those_that_are_trained(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(
        '{"role": "甲", "system": "", "prompt": "问", "response": "答"}\n'
        '{"role": "甲", "system": "", "prompt": "又问", "response": "答"}\n'
        '{"role": "乙", "system": "", "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": '
        '"不学", "train": false}, {"role": "user", "content": "问"}, {"role": "assistant", "content": "学"}]}\n'
    )
    assert recorded_answers(path) == {"甲": ["答"], "乙": ["学"]}


def test_style_by_hand():
    """Roles that share no character are told apart by a single one; a text of neither has no character, or some role."""
    style = Style({"甲": ["子丑寅", "寅卯", "丑丑"], "乙": ["天地玄黄", "宇宙"]})
    assert style.roles_of(["卯寅", "地黄天", "", " \n"]) == ["甲", "乙", "", ""]
    assert style.roles_of([]) == []
    limits = style_limits(
        [question("甲", "子丑", "玄黄"), question("乙", "宇"), question("甲", "寅", kind="round 1")], style
    )
    assert limits[:2].tolist() == [[0.5, 0.0], [1.0, 0.5]]  # of the two recorded answers of 甲, one sounds like 乙
    assert limits[2, 0] == 1 and np.isnan(limits[2, 1])  # nobody else has a question of that kind


def test_answers_of_another_role_are_at_the_floor_and_recorded_ones_at_the_ceiling(recorded, questions):
    roles = list(recorded)
    style = Style(recorded)
    own = answered(*(question.references[0] for question in questions))
    swapped = []  # every role answers with what the next one has said
    for number, asked in enumerate(questions):
        other = roles[(roles.index(asked.role) + 1) % len(roles)]
        texts = [one.references[0] for one in questions if one.role == other]
        swapped += answered(texts[number % len(texts)])
    models = {
        name: measure_answers(questions, texts, style, None) for name, texts in (("own", own), ("swapped", swapped))
    }
    scores, table = answer_sections(questions, models, style, None, 200, 1)
    rows = {row[1]: [text.split(" ")[0] for text in row[3:]] for row in table.rows if row[0] == "all"}
    style_own, ceiling, floor = map(float, rows["own"])
    assert style_own == ceiling > 80 and floor < 10
    assert float(rows["swapped"][0]) <= floor + 5
    difference = next(row for row in table.rows if row[:2] == ["all", "difference"])
    assert difference[4:] == ["", ""] and difference[3].startswith("-") and "−" not in difference[3]
    assert ceiling - float(rows["swapped"][0]) == pytest.approx(-float(difference[3].split(" ")[0]), abs=0.11)
    for section in (scores, table):
        for column in section.rows[0][3:]:
            assert f"{column}:" in section.note


def test_scores_do_not_depend_on_the_order_of_the_questions(recorded, questions):
    """Answers come in whatever batches; what is measured is of the questions."""
    style, recall = Style(recorded), Recall(recorded)
    texts = answered(*(question.references[0][::-1][:9] for question in questions))

    def tables(order):
        asked, given = [questions[number] for number in order], [texts[number] for number in order]
        sections = answer_sections(asked, {"model": measure_answers(asked, given, style, recall)}, style, recall, 5, 1)
        return [
            sorted([*row[:3], *(text.split(" ")[0] for text in row[3:])] for row in section.rows)
            for section in sections
        ]

    order = np.arange(len(questions))
    assert tables(order) == tables(order[::-1])
