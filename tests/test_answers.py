"""What is measured of answers: by hand, against definitions, and with intervals."""

from itertools import pairwise

import jieba
import numpy as np
import pytest
from conftest import ROOT, turns

from data_helper import persona
from predict import Question
from support.dialogues.profiles import read_characters
from support.model.answering import Answer
from support.scores.answers import catchwords, measure_answers, rouge_l
from support.scores.table import compare


def test_catchwords_of_personas():
    assert catchwords(persona("皇帝", "一个君王，“官二代”之主。常用口头禅是：“朕”、“本皇”")) == ["朕", "本皇"]
    assert catchwords(persona("孙悟空", "美猴王。说话爱自称“俺老孙”“我齐天大圣”。")) == ["俺老孙", "我齐天大圣"]
    profiles = read_characters(ROOT / "data/sample/profiles-zh_desc.json")
    found = {role: catchwords(persona(role, profile["description"])) for role, profile in profiles.items()}
    assert {role for role in profiles if not found[role]} == {"李白"}
    assert "官二代" not in found["华妃"] and "本宫" in found["华妃"]


def longest_common(a: list, b: list) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def test_rouge_l_against_its_definition():
    pairs = [
        ("俺老孙一个筋斗十万八千里", "俺老孙翻一个筋斗云便是十万八千里"),
        ("今天天气很好我们去喝酒", "我们今天去江边喝酒看月亮"),
        ("俺老孙来也", "朕知道了"),
    ]
    for answer, reference in pairs:
        a, b = list(jieba.cut(answer)), list(jieba.cut(reference))
        common = longest_common(a, b)
        expected = 2 * common / (len(a) + len(b))  # F-measure of common / len(a) and common / len(b)
        assert rouge_l(answer, reference) == pytest.approx(expected, abs=1e-6)
    assert rouge_l("吃我一矛！", "吃我一矛！") == pytest.approx(1, abs=1e-6)
    assert rouge_l("", "吃我一矛！") == rouge_l(" \n", "吃我一矛！") == 0
    assert 0 <= rouge_l("。" * 1100, "……！？" * 50) <= 1  # long, odd texts neither fail nor recurse


def test_measures_by_hand():
    emperor, questions = "常用口头禅是：“朕”、“本皇”", []
    recorded = [
        (emperor, ["朕知道了", "甲乙丙丁"]),
        (emperor, ["朕知道了"]),
        (emperor, ["朕知道了"]),
        ("", ["举杯邀明月"]),
    ]
    for n, (system, references) in enumerate(recorded):
        questions.append(Question("角色", system, f"问{n}", None, None, references, turns(f"问{n}")))
    answers = [Answer("朕知道了", True), Answer("朕知道了", False), Answer("", True), Answer("举杯邀明月", True)]
    scores = measure_answers(questions, answers, None, None, {}).scores
    words = [list(jieba.cut(text)) for text in ("朕知道了", "举杯邀明月")]
    first, second = (set(pairwise(line)) for line in words)
    twice, once = 2 * len(list(pairwise(words[0]))), len(list(pairwise(words[1])))
    expected = {"rouge_l": (0.5 + 1 + 0 + 1) / 4, "catchwords": 2 / 3, "stops": 3 / 4}
    expected["distinct_2"] = len(first | second) / (twice + once)

    def estimates(kinds):
        found = {name: score._replace(items=score.items._replace(kind=kinds)) for name, score in scores.items()}
        return {row.measure: row.models[0] for row in compare({"model": found}, 50, 1, "kind", "甲")}

    def values(kinds):
        return {name: own.value / 100 for name, own in estimates(kinds).items()}

    assert values(["甲"] * 4) == pytest.approx(expected, abs=1e-6)
    assert "catchwords" not in values([None, None, None, "甲"])  # nobody's
    assert "distinct_2" not in values([None, None, "甲", None])  # no words, so no pairs
    assert values(["甲", None, None, None])["distinct_2"] == pytest.approx(len(first) / (twice / 2))
    # A question drawn several times says nothing else than once; nor does one whose pairs another has too.
    assert estimates(["甲", "甲", None, None])["distinct_2"] == pytest.approx((100 * len(first) / twice,) * 3)
