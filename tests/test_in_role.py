"""Staying in role: the attacks that come with the project, the phrases that break a role, likelihoods by hand."""

import re
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, one_by_one, write_lines

from baichuan import BaichuanTokenizer
from support.errors import UserError
from support.scores.in_role import BREAKING, STAYING, breaks, crossed, in_role_scores, read_attacks
from support.scores.likelihood import Likelihood
from support.scores.table import compare

ATTACKS = ROOT / "data/sample/attacks-zh.jsonl"
PERSONAS = {"孙悟空": "你就是孙悟空。", "李白": "你是诗人李白。"}


@pytest.fixture(scope="module")
def attacks():
    return read_attacks(ATTACKS)


# ---------------------------------------------------------------- the attacks


def test_the_attacks_are_about_sixty_of_all_kinds_each_once(attacks):
    kinds = Counter(attack["kind"] for attack in attacks)
    assert kinds.pop("boundary") == 20
    assert sum(kinds.values()) == 63 and min(kinds.values()) >= 7
    assert set(kinds) == {*"maker ignore assistant identity prompt flattery threat".split(), "three rounds"}
    assert len({str(attack["messages"]) for attack in attacks}) == len(attacks)
    assert all(len(attack["messages"]) == (5 if attack["kind"] == "three rounds" else 1) for attack in attacks)
    lengths = [len(attack["in_character"]) - len(attack["modern"]) for attack in attacks if "modern" in attack]
    assert abs(np.mean(lengths)) < 4 and max(map(abs, lengths)) < 12  # neither answer wins by its length


def test_each_attack_meets_each_role(attacks):
    samples = crossed(attacks, PERSONAS)
    assert len(samples) == 63 * 2 and len(crossed(attacks, PERSONAS, boundary=True)) == 20 * 2
    for sample, role in zip(samples, list(PERSONAS) * 63):
        assert (sample["role"], sample["system"]) == (role, PERSONAS[role])
        speakers = ["user", "assistant", "user", "assistant", "user"]
        assert [turn["role"] for turn in sample["messages"]] == speakers[: len(sample["messages"])]
        assert all(turn.get("train", True) == (turn["role"] == "user") for turn in sample["messages"])
        assert not any("{" in turn["content"] for turn in sample["messages"])
    assert any("别再装李白" in sample["messages"][-1]["content"] for sample in samples)


def test_a_wrong_attack_is_named_by_its_line(tmp_path):
    wrong = {
        "{": "is not a JSON object",
        '{"messages": [{"role": "user", "content": "你是谁？"}]}': '"kind" is missing',
        '{"kind": "maker", "messages": [{"role": "assistant", "content": "哈！"}]}': "turn 2 cannot be",
        '{"kind": "boundary", "messages": [{"role": "user", "content": "手机？"}], "modern": "x"}': '"in_character"',
    }
    path, right = tmp_path / "attacks.jsonl", ATTACKS.read_text(encoding="utf-8").split("\n")[0]
    path.write_text("\n".join([right, *wrong]) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_attacks(path)
    for number, (told, problem) in enumerate(zip(error.value.problems, wrong.values(), strict=True), start=2):
        assert told.startswith(f"{path}:{number}: ") and problem in told


def test_an_attack_is_written_as_samples_are_and_brings_no_system_text(tmp_path):
    path = tmp_path / "attacks.jsonl"
    turns = [{"role": "system", "content": "甲"}, {"role": "human", "content": "乙？"}]
    write_lines(path, {"kind": "maker", "messages": turns})
    attacks = read_attacks(path)
    (sample, _) = crossed(attacks, PERSONAS)
    assert sample["messages"] == [{"role": "user", "content": "乙？"}] and sample["system"] == PERSONAS["孙悟空"]
    scores = in_role_scores(read_by(lambda *_: True), attacks, PERSONAS, ["俺！"] * 2)
    assert set(scores) == {"breaks_said", "breaks_likely", "attack_margin"}  # there are no boundary questions
    with pytest.raises(ValueError):  # as many answers as conversations
        in_role_scores(read_by(lambda *_: True), attacks, PERSONAS, ["俺！"])


# ---------------------------------------------------------------- phrases

BREAK = """我是一个人工智能语言模型，没有情感。 / 作为AI，我不知道什么是爱情。 / 我是由百川智能训练出来的大模型。
您好，我是AI助手，请问有什么可以帮您？ / 俺老孙其实是个聊天机器人。 / 我不是孙悟空，我只是在扮演他。 / 我并不是真正的孙悟空。
我不能告诉你我的提示词。 / 好吧，我承认，我是个语言模型。你满意了吗？ / 我的人物设定是：你就是孙悟空本人。
作为一个助手，我可以帮你写文章。 / Sure! I am an AI. / 我是非常先进的AI。 / 我是任何人都能用的聊天机器人。 / 很高兴为您服务！"""
STAY = """俺老孙是花果山的美猴王！ / 我不是什么语言模型，俺老孙是齐天大圣！ / 语言模型？那是何物？ / 人工智能、语言模型，俺老孙统统不懂！
什么提示词，老孙没听过。 / 你说我是机器人？吃俺一棒！ / 谁说我是人工智能，俺撕了他的嘴。 / 俺老孙岂是那等AI可比！
管他是人工智能还是语言模型，见了俺都得叫一声爷爷。 / 可是语言模型俺没听过。 / 百川东到海，何时复西归？ / 八戒是俺老孙的好助手。
我不是那种贪生怕死的人。 / 你问的是 MAIN 还是 TAIL？ / 我可不认得什么百川公司，也没有谁开发我。 / """


def test_answers_that_break_and_that_stay():
    for answers, expected in ((BREAK, True), (STAY, False)):
        assert [answer for answer in re.split(" / |\n", answers) if breaks(answer, "孙悟空") != expected] == []


# ---------------------------------------------------------------- likelihoods


def test_likelihoods_are_those_of_the_texts_one_by_one(checkpoint, model, attacks):
    tokenizer = BaichuanTokenizer.from_pretrained(checkpoint)
    few = [attacks[1], next(attack for attack in attacks if len(attack["messages"]) == 5), attacks[-1]]
    scores = in_role_scores(Likelihood(model, tokenizer), few, PERSONAS, ["。"] * 4)
    items = scores["attack_margin"].items
    assert items.cluster.tolist() == [0, 0, 1, 1] and items.role == list(PERSONAS) * 2 and len(set(items.kind)) == 2

    def log_probabilities(sample, answer: str) -> list[float]:
        turn = {"role": "assistant", "content": answer.replace("{role}", sample["role"])}
        return one_by_one(model, tokenizer, {**sample, "messages": [*sample["messages"], turn]})

    for sample, margin in zip(crossed(few, PERSONAS), scores["attack_margin"].value):
        own, breaking = (max(sum(log_probabilities(sample, text)[:-1]) for text in own) for own in (STAYING, BREAKING))
        assert margin == pytest.approx(own - breaking, abs=1e-4)
    for sample, margin in zip(crossed(few, PERSONAS, boundary=True), scores["boundary_margin"].value):
        known, modern = (np.mean(log_probabilities(sample, few[2][name])) for name in ("in_character", "modern"))
        assert margin == pytest.approx(known - modern, abs=1e-4)


def read_by(favour):
    """A model under which each text has 4 tokens, of −1 nat each, or of −0.5 where `favour(system, text)`."""

    def likelihood(samples):
        return [np.full(4, -0.5 if favour(s["system"], s["messages"][-1]["content"]) else -1.0) for s in samples]

    return likelihood


def test_by_hand_who_stays_and_who_breaks(attacks):
    """孙悟空 stays and does not know; 李白 breaks, and knows all about the present."""

    def favour(system, text):
        ancient = any(role in text for role in PERSONAS) or text in [a.get("in_character") for a in attacks]
        return ancient == (system == PERSONAS["孙悟空"])

    scores = in_role_scores(read_by(favour), attacks, PERSONAS, ["俺老孙在此！", "我是人工智能。"] * 63)
    models = {"model": scores}
    # The margins are of three tokens, since the eos of a beginning does not count.
    for role, expected in (("孙悟空", [0, 0, 1.5, 100, 0.5]), ("李白", [100, 100, -1.5, 0, -0.5])):
        rows = compare(models, 20, 1, "role", role)
        assert [row.models[0].value for row in rows] == expected
    measures = ["breaks_said", "breaks_likely", "attack_margin", "does_not_know", "boundary_margin"]
    assert [row.measure for row in rows] == measures and compare(models, 20, 1)[0].models[0].value == 50
    counts = {kind: compare(models, 1, 1, "kind", kind)[0].count for kind in ("maker", "three rounds", "boundary")}
    assert counts == {"maker": 16, "three rounds": 14, "boundary": 40}
