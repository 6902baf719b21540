"""What a browser keeps of the conversations, and what becomes of it."""

import json
from copy import deepcopy

import pytest

from support.page import chats


def version(text: str, state="done", base="") -> dict:
    return {"text": text, "base": base, "state": state}


def turn(question, *versions, shown=0) -> dict:
    return {"question": question, "versions": list(versions), "shown": shown}


GROWN = version("我是", "cut", "b")


@pytest.mark.parametrize("versions, grown, ended, after, lost", [
    ([version("")], GROWN, True, [GROWN], ""),
    ([version("x"), version("")], GROWN, False, [version("x"), GROWN], ""),
    ([version("")], GROWN | {"text": " "}, True, None, "问"),
    ([version("")], GROWN | {"text": ""}, False, [version("", "cut", "b")], ""),
    ([version("x"), version("")], GROWN | {"text": ""}, True, [version("x")], ""),
    ([version("x")], {}, True, [version("x")], ""),
    (None, GROWN, True, None, ""),
])  # fmt: skip
def test_an_answer_is_kept_as_far_as_it_is_written(versions, grown, ended, after, lost):
    """A question without a word of an answer goes back; earlier turns stay as they are."""
    earlier = [turn("早？", version("早。"))] if versions else []
    chat = {"greeting": "", "turns": deepcopy(earlier)}
    if versions:
        chat["turns"].append(turn("问", *versions, shown=len(versions) - 1))
    kept = {"role": "李白", "chats": {"李白": [chat]}, "shown": {"李白": 0}}
    whose = {"role": "李白", "chat": 0, "question": "问", "version": grown} if grown else {}
    assert chats.settle(kept, whose, ended) == lost
    assert chat["turns"] == earlier + ([turn("问", *after, shown=len(after) - 1)] if after else [])


def test_an_answer_that_grows_stays_in_its_own_conversation():
    """Whichever is shown when it is kept, and whatever another tab has done to that one meanwhile."""
    kept = {"role": "", "chats": {}, "shown": {}}
    for role in ("李白", "张飞"):
        chats.add_turn(chats.open_chat(kept, role, ""), f"{role}？")
        chats.add_version(kept["chats"][role][0]["turns"][0], text="旧", state="done")
    chats.add_version(kept["chats"]["张飞"][0]["turns"][0])
    grown = chats.growing(kept)
    grown["version"]["text"] = "新"
    kept["role"] = "李白"
    assert chats.settle(other := deepcopy(kept), grown) == ""
    answers = {role: chats.shown_version(other["chats"][role][0]["turns"][0])["text"] for role in other["chats"]}
    assert answers == {"李白": "旧", "张飞": "新"}
    for lost in ("", "别的？"):  # nothing of it is left, or another question
        other["chats"]["张飞"][0]["turns"] = [turn(lost)] if lost else []
        assert chats.settle(other, grown) == lost and other["chats"]["张飞"][0]["turns"] == []
    assert chats.settle(kept, {}) == "" and [
        chats.shown_version(t)["text"] for t in kept["chats"]["张飞"][0]["turns"]
    ] == ["旧"]


def test_turns_without_an_answer_are_left_out():
    bare, said = turn("甲？"), turn("乙？", version("乙。"))
    kept = {"role": "李白", "chats": {"李白": [{"greeting": "", "turns": [bare, said, bare]}]}, "shown": {"李白": 0}}
    read = [message["content"] for message in chats.prompt(kept["chats"]["李白"][0], "诗人", greeted=True)]
    assert read == ["诗人", "乙？", "乙。", "甲？"]
    assert chats.samples(kept, "诗人", greeted=True) == ""


def test_conversations_come_and_go():
    kept = deepcopy(chats.NOTHING)
    first = chats.open_chat(kept, "李白", "来也！")
    assert chats.open_chat(kept, "李白", "") is first and first == {"greeting": "来也！", "turns": []}
    second, third = (chats.add(kept, greeting) for greeting in ("二", "三"))
    assert kept["shown"] == {"李白": 2} and chats.open_chat(kept, "李白", "") is third
    kept["shown"]["李白"] = 1
    for left in (third, first):  # the next one, or else the one before
        chats.remove(kept)
        assert chats.open_chat(kept, "李白", "") is left
    chats.remove(kept)
    assert kept["chats"] == {} and chats.open_chat(kept, "李白", "又来") == {"greeting": "又来", "turns": []}
    assert chats.NOTHING == {"role": "", "chats": {}, "shown": {}}


def test_conversations_are_read_by_the_model_and_become_training_data():
    """As they are shown, up to the last finished answer: a stopped or cut one would be learnt as a whole one."""
    turns = [
        turn("一", version("甲", "cut"), version("丙", "edited", base="B"), shown=1),
        turn("二", version("丁"), version("无")),
        turn("三", version("戊", "stopped")),
        turn("四", version("庚")),
    ]
    chat, other = {"greeting": "来也！", "turns": turns}, {"greeting": "", "turns": [turn("早？", version("早。"))]}
    unfinished = {"greeting": "", "turns": [turn("五", version("己", "cut")), *turns[3:]]}
    kept = {"role": "李白", "chats": {"李白": [chat, unfinished, other], "张飞": [other]}, "shown": {}}
    said = {"text": ["一", "丙", "二", "丁", "三", "戊", "四"], "base": ["一", "B", "二", "丁", "三", "戊", "四"]}
    for greeted, begin in ((True, ["来也！"]), (False, [])):
        for whose, texts in said.items():
            _, *messages = chats.prompt(chat, "诗人", greeted, whose)
            assert [message["content"] for message in messages] == begin + texts
            roles = [message["role"] for message in reversed(messages)]
            assert roles == (["user", "assistant"] * 4)[: len(messages)]
        lines = list(map(json.loads, chats.samples(kept, "诗人", greeted).splitlines()))
        assert [(line["role"], line["system"]) for line in lines] == [("李白", "诗人")] * 2
        contents = [[message["content"] for message in line["messages"]] for line in lines]
        assert contents == [[*begin, *said["text"][:4]], ["早？", "早。"]]
        assert {line["messages"][-1]["role"] for line in lines} == {"assistant"}
