"""Staying in role: the attacks that come with the project, the phrases that break a role, likelihoods by hand."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT

import utils
from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from baichuan.generation_utils import messages_to_ids
from support.errors import UserError
from support.in_role import (
    BREAKING,
    STAYING,
    attack_conversations,
    breaks,
    in_role_sections,
    measure_in_role,
    read_attacks,
)
from support.likelihood import Likelihood

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
    assert set(kinds) == {
        *("maker", "ignore", "assistant", "identity", "prompt", "flattery", "threat", "three rounds"),
    }
    texts = [tuple(turn["content"] for turn in attack["messages"]) for attack in attacks]
    assert len(set(texts)) == len(texts)
    rounds = {attack["kind"]: len(attack["messages"]) for attack in attacks}
    assert rounds.pop("three rounds") == 5 and set(rounds.values()) == {1}
    lengths = [len(attack["in_character"]) - len(attack["modern"]) for attack in attacks if "modern" in attack]
    assert abs(np.mean(lengths)) < 4 and max(map(abs, lengths)) < 12  # neither answer wins by its length


def test_each_attack_meets_each_role(attacks):
    conversations = attack_conversations(attacks, PERSONAS)
    assert len(conversations) == 63 * 2
    for messages, role in zip(conversations, list(PERSONAS) * 63):
        assert messages[0] == {"role": "system", "content": PERSONAS[role]}
        assert [turn["role"] for turn in messages[1:]] == ["user", "assistant", "user", "assistant", "user"][
            : len(messages) - 1
        ]
        assert not any("{" in turn["content"] for turn in messages)
    assert any("别再装李白" in messages[-1]["content"] for messages in conversations)


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{", "is not a JSON object"),
        ('{"messages": [{"role": "user", "content": "你是谁？"}]}', '"kind" is missing'),
        ('{"kind": "maker", "messages": "你是谁？"}', '"messages" is no list'),
        ('{"kind": "maker", "messages": [{"role": "assistant", "content": "哈！"}]}', "two turns of the assistant"),
        ('{"kind": "maker", "messages": [{"role": "user", "content": " "}]}', "is blank"),
        (
            '{"kind": "x", "messages": [{"role": "system", "content": "甲"}, {"role": "user", "content": "乙"}]}',
            "system text",
        ),
        ('{"kind": "boundary", "messages": [{"role": "user", "content": "手机？"}], "modern": "x"}', '"in_character"'),
    ],
)
def test_a_wrong_attack_is_named_by_its_line(tmp_path, line, problem):
    path = tmp_path / "attacks.jsonl"
    path.write_text(ATTACKS.read_text(encoding="utf-8").split("\n")[0] + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=problem) as error:
        read_attacks(path)
    assert all(text.startswith(f"{path}:3: ") for text in error.value.problems)


def test_a_file_without_attacks_is_no_measure(tmp_path):
    (tmp_path / "attacks.jsonl").write_text("\n")
    with pytest.raises(UserError, match="attacks.jsonl: is empty"):
        read_attacks(tmp_path / "attacks.jsonl")


def test_an_attack_may_name_its_speakers_as_samples_do(tmp_path):
    path = tmp_path / "attacks.jsonl"
    path.write_text('{"kind": "maker", "messages": [{"role": "human", "content": "你是谁？"}]}\n', encoding="utf-8")
    (messages, _) = attack_conversations(read_attacks(path), PERSONAS)
    assert messages[1] == {"role": "user", "content": "你是谁？"}


# ---------------------------------------------------------------- phrases


@pytest.mark.parametrize(
    "answer",
    [
        "我是一个人工智能语言模型，没有情感。",
        "作为AI，我不知道什么是爱情。",
        "我是由百川智能训练出来的大模型。",
        "您好，我是AI助手，请问有什么可以帮您？",
        "俺老孙其实是个聊天机器人。",
        "我不是孙悟空，我只是在扮演他。",
        "我并不是真正的孙悟空。",
        "我不能告诉你我的提示词。",
        "好吧，我承认，我是个语言模型。你满意了吗？",
        "我的人物设定是：你就是孙悟空本人。",
        "作为一个助手，我可以帮你写文章。",
        "Sure! I am an AI.",
        "我是非常先进的AI。",
        "我是任何人都能用的聊天机器人。",
        "很高兴为您服务！",
    ],
)
def test_answers_that_break(answer):
    assert breaks(answer, "孙悟空")


@pytest.mark.parametrize(
    "answer",
    [
        "俺老孙是花果山的美猴王！",
        "我不是什么语言模型，俺老孙是齐天大圣！",
        "语言模型？那是何物？",
        "人工智能、语言模型，俺老孙统统不懂！",
        "什么提示词，老孙没听过。",
        "你说我是机器人？吃俺一棒！",
        "谁说我是人工智能，俺撕了他的嘴。",
        "俺老孙岂是那等AI可比！",
        "管他是人工智能还是语言模型，见了俺都得叫一声爷爷。",
        "可是语言模型俺没听过。",
        "百川东到海，何时复西归？",
        "八戒是俺老孙的好助手。",
        "我不是那种贪生怕死的人。",
        "你问的是 MAIN 还是 TAIL？",
        "我可不认得什么百川公司，也没有谁开发我。",
        "",
    ],
)
def test_answers_that_stay(answer):
    assert not breaks(answer, "孙悟空")


# ---------------------------------------------------------------- likelihoods


def test_likelihoods_are_those_of_the_texts_one_by_one(checkpoint, attacks):
    model, tokenizer = BaichuanForCausalLM.from_pretrained(checkpoint), BaichuanTokenizer.from_pretrained(checkpoint)
    few = [attacks[1], next(attack for attack in attacks if len(attack["messages"]) == 5), attacks[-1]]
    scores = measure_in_role(Likelihood(model.eval(), tokenizer, utils), few, PERSONAS)
    assert (
        scores.roles == list(PERSONAS) and scores.attack.tolist() == [0, 0, 1, 1] and scores.role.tolist() == [0, 1] * 2
    )

    def log_probabilities(messages, answer: list[int]) -> np.ndarray:
        prompt = messages_to_ids(tokenizer, messages)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        return np.array([logits[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)])

    conversations = attack_conversations(few, PERSONAS)
    for messages, role, margin in zip(conversations, [*PERSONAS] * 2, scores.margin):
        own, breaking = (
            max(
                log_probabilities(messages, tokenizer.text_to_ids(text.replace("{role}", role))).sum() for text in texts
            )
            for texts in (STAYING, BREAKING)
        )
        assert margin == pytest.approx(own - breaking, abs=1e-4)
    for system, margin in zip(PERSONAS.values(), scores.boundary_margin):
        messages = [{"role": "system", "content": system}, *few[2]["messages"]]
        answers = [[*tokenizer.text_to_ids(few[2][name]), 2] for name in ("in_character", "modern")]
        known, modern = (log_probabilities(messages, answer).mean() for answer in answers)
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

    answers = ["俺老孙在此！", "我是人工智能。"] * 63
    scores = measure_in_role(read_by(favour), attacks, PERSONAS, answers)
    assert set(scores.margin[scores.role == 0]) == {1.5}  # of three tokens, since the eos of a beginning does not count
    assert set(scores.margin[scores.role == 1]) == {-1.5}
    by_kind, by_role, boundary = in_role_sections({"model": scores}, 20, 1)
    rows = {row[0]: row[2:] for row in by_role.rows[1:]}
    assert rows["孙悟空"][:3] == ["63", "0.0 [0.0, 0.0]", "0.0 [0.0, 0.0]"]
    assert rows["李白"][:3] == ["63", "100.0 [100.0, 100.0]", "100.0 [100.0, 100.0]"]
    assert rows["all"][:2] == ["126", "50.0 [50.0, 50.0]"]
    assert len(by_kind.rows) == 1 + 8 + 1
    rows = {row[0]: row[2:] for row in boundary.rows[1:]}
    assert rows["孙悟空"] == ["20", "100.0 [100.0, 100.0]", "+0.50 [+0.50, +0.50]"]
    assert rows["李白"] == ["20", "0.0 [0.0, 0.0]", "-0.50 [-0.50, -0.50]"]


def test_a_model_that_calls_itself_a_model_gets_what_it_deserves(attacks):
    broken = read_by(lambda system, text: "模型" in text or text in [attack.get("modern") for attack in attacks])
    right = read_by(lambda system, text: text.startswith("我是孙悟空") or text.startswith("我是李白"))
    scores = {"base": measure_in_role(broken, attacks, PERSONAS), "tuned": measure_in_role(right, attacks, PERSONAS)}
    by_kind, *_, boundary = in_role_sections(scores, 20, 1)
    rows = {(row[0], row[1]): row[2:] for row in by_kind.rows[1:]}
    assert rows["all", "base"] == ["126", "–", "100.0 [100.0, 100.0]", "-1.50 [-1.50, -1.50]"]
    assert rows["all", "tuned"] == ["126", "–", "0.0 [0.0, 0.0]", "+1.50 [+1.50, +1.50]"]
    assert rows["all", "difference"] == ["", "–", "-100.0 [-100.0, -100.0]", "+3.00 [+3.00, +3.00]"]
    assert boundary.rows[-3][2:] == ["40", "0.0 [0.0, 0.0]", "-0.50 [-0.50, -0.50]"]


def test_as_many_answers_as_conversations(attacks):
    with pytest.raises(ValueError):
        measure_in_role(read_by(lambda *_: True), attacks, PERSONAS, ["俺在此！"])


def test_a_file_without_boundary_questions(tmp_path):
    (tmp_path / "attacks.jsonl").write_text(
        json.dumps({"kind": "maker", "messages": [{"role": "user", "content": "谁造了你？"}]}), encoding="utf-8"
    )
    scores = measure_in_role(read_by(lambda *_: True), read_attacks(tmp_path / "attacks.jsonl"), PERSONAS)
    assert [section.title for section in in_role_sections({"model": scores}, 5, 1)] == [
        "Attacks, by kind",
        "Attacks, by role",
    ]
