"""Style and recall: by hand, at their ceiling and floor, and in the tables."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import conversation, said, write_lines

from predict import Question
from support.dialogues.samples import read_samples
from support.model.answering import Answer
from support.scores.answers import measure_answers, recorded_limits
from support.scores.table import compare, texts
from support.scores.voice import Recall, Style, read_training


def question(role: str, *references: str, kind="general", system=""):
    messages = [{"role": "user", "content": f"与“{references[0]}”相配的问题？"}]
    return Question(role, system, messages[0]["content"], kind, None, list(references), messages)


def measured(questions, answers, style=None, recall=None):
    return measure_answers(questions, answers, style, recall, recorded_limits(questions, style, recall)).scores


def rows_of(models: dict, by="", label="", resamples=50) -> dict:
    return {row.measure: row for row in compare(models, resamples, 1, by, label)}


def answered(*texts: str) -> list[Answer]:
    return [Answer(text, True) for text in texts]


def test_longest_piece_against_all_pieces():
    draw = np.random.default_rng(0)
    for _ in range(200):
        answer, text = ("".join(draw.choice(list("甲乙丙"), size)) for size in (draw.integers(0, 12), 40))
        pieces = [answer[i:j] for i in range(len(answer)) for j in range(i + 1, len(answer) + 1)]
        longest = max((len(piece) for piece in pieces if piece in text), default=0)
        found = Recall({"李白": [text]}).nearest("李白", answer)
        assert found == (longest / max(1, len(answer)), text if longest else "")


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
    scores = measured(questions, answered("举杯邀明月", "举杯邀明", "戊己", "举杯戊己庚"), style, recall)
    assert scores["copied"].value.tolist() == [100, 100, 0, 40]
    assert scores["copies"].value.tolist() == [100, 100, 0, 0]
    assert scores["rouge_l"].value == pytest.approx([100, 0, 0, 0], abs=1e-4)
    for name, values in (("rouge_l_others", [0, 0]), ("style_others", [100, 100])):
        assert np.isnan(scores[name].value[:2]).all() and scores[name].value[2:].tolist() == values
    rows = rows_of({"model": scores})
    assert rows["copied"].models[0].value == 60 and rows["copies"].models[0].value == 50
    assert rows["copies"].beside == {"recorded": 25}  # one recorded answer is a copy
    assert rows["style_others"].models[0].value == 100
    half = measured([question("李白", "举杯甲乙")], answered("举杯丙丁"), style, recall)["copies"]
    assert half.value.tolist() == half.beside["recorded"].tolist() == [100]


def test_a_role_without_training_answers_has_no_copies_and_no_style(tmp_path):
    path = tmp_path / "train.json"
    write_lines(path, *(said(role, "", "问", text) for role, text in (("李白", "举杯邀明月"), ("张飞", "哇呀呀"))))
    questions = [question("李白", "举杯邀明月"), question("杜甫", "国破山河在")]
    style, recall, remarks = read_training(path, questions, texts("en"))
    assert remarks == [f"--train_path {path}: has no answers of 杜甫: no style or copies for them."]
    assert read_training(path, questions, texts("zh"))[2][0].endswith("没有杜甫的答案：不计其风格和照抄。")
    known = [questions[0]._replace(prompt="问"), questions[0]]
    assert read_training(path, known, texts("en"))[2][0].startswith("1 of the questions are in the training samples")
    models = {"model": measured(questions, answered("举杯", "举杯"), style, recall)}
    of_li_bai, of_all = rows_of(models, "role", "李白"), rows_of(models)
    assert set(rows_of(models, "role", "杜甫")) == {"rouge_l", "stops"}
    for name in ("style", "copies", "copied"):
        assert of_li_bai[name].models[0].value == of_all[name].models[0].value == 100
        assert of_li_bai[name].beside == of_all[name].beside


def test_rounds_of_a_conversation_are_drawn_together():
    """Eight rounds that are alike are no more certain than one."""
    questions = [question("李白", text) for text in ("举杯", "明月", "金樽")] * 8
    row = rows_of({"model": measured(questions, answered(*("举杯", "明月", "无") * 8))}, resamples=400)["rouge_l"]
    assert row.count == 24 and row.models[0] == pytest.approx((66.667, 0, 100), abs=0.01)


# ---------------------------------------------------------------- style


def test_training_answers_are_those_that_are_trained(tmp_path):
    path = tmp_path / "train.json"
    unsure = {**conversation("", "问", "不学", "问", "学", silent=[1]), "role": "乙"}
    write_lines(path, said("甲", "", "问", "答"), said("甲", "", "又问", "答"), unsure)
    assert read_training(path, [], texts("en"))[1].recorded == {"甲": ["答"], "乙": ["学"]}


def test_style_by_hand():
    """Roles that share no character are told apart by a single one; a text of neither has no character, or some role."""
    style = Style({"甲": ["子丑寅", "寅卯", "丑丑"], "乙": ["天地玄黄", "宇宙"]})
    assert style.roles_of(["卯寅", "地黄天", "", " \n"]) == ["甲", "乙", "", ""]
    assert style.roles_of([]) == []
    questions = [question("甲", "子丑", "玄黄"), question("乙", "宇"), question("甲", "寅", kind="other")]
    limits = recorded_limits(questions, style, None)["style"]
    assert limits["ceiling"].tolist() == [50, 100, 100]  # of the two recorded answers of 甲, one sounds like 乙
    assert limits["floor"][:2].tolist() == [0, 50] and np.isnan(limits["floor"][2])  # nobody else has such a question


def test_answers_of_another_role_are_at_the_floor_and_recorded_ones_at_the_ceiling(samples):
    recorded = read_training(Path(samples[0]), [], texts("en"))[1].recorded
    questions = [question(sample["role"], sample["messages"][-1]["content"]) for sample in read_samples(samples[1])]
    roles, style, swapped = list(recorded), Style(recorded), []
    own = answered(*(question.references[0] for question in questions))
    for number, asked in enumerate(questions):  # every role answers with what the next one has said
        other = roles[(roles.index(asked.role) + 1) % len(roles)]
        lines = [one.references[0] for one in questions if one.role == other]
        swapped += answered(lines[number % len(lines)])
    models = {"own": measured(questions, own, style), "swapped": measured(questions, swapped, style)}
    row = rows_of(models, resamples=200)["style"]
    own, swapped = row.models
    assert own.value == pytest.approx(row.beside["ceiling"]) and own.value > 80
    assert row.beside["floor"] < 10 and swapped.value <= row.beside["floor"] + 5
    assert row.differences[0].value == pytest.approx(swapped.value - own.value) and row.verdicts() == [-1]
