"""What a browser keeps of the conversations, and what becomes of it."""

import json

import pytest

from support.page import chats


def version(text: str, state="done", base="") -> dict:
    return {"text": text, "base": base, "state": state}


def turn(question, *versions, shown=0) -> dict:
    return {"question": question, "versions": list(versions), "shown": shown}


def kept(*turns) -> dict:
    """Two conversations with a role, of which the second one is shown, and one with another role."""
    other = {"id": "1", "greeting": "", "turns": [turn("早？", version("早。"))]}
    both = [other, {"id": "2", "greeting": "来也！", "turns": list(turns)}]
    return {"role": "李白", "chats": {"李白": both, "张飞": [other | {"id": "3"}]}, "shown": {"李白": 1, "张飞": 0}}


def test_what_is_kept_comes_back():
    """And numbers of what is not there become those of what is."""
    expected = kept(turn("谁？", version("我\u2028<b>"), version("", "stopped", "b"), shown=1), turn("还有？"))
    assert chats.read(chats.write(expected)) == expected
    beyond = json.loads(chats.write(expected)) | {"shown": {"李白": 9, "张飞": -9}}
    beyond["chats"]["李白"][1]["turns"][0]["shown"] = 9
    assert chats.read(chats.write(beyond)) == expected


MALFORMED = [None, 5, "", "{", "null", "[]", "5", '"a"', "[" * 200_000, '{"a":' * 200_000]


OTHERS = [{}, {"role": "a"}, {"role": "a", "chats": []}, {"role": "a", "chats": {"a": 5}, "shown": {}}]


OTHERS += [kept(part) for part in (None, 5, "a", [], {}, turn("a", None), turn("a", {"text": "a"}))]


OTHERS += [kept(turn("a", shown=shown)) for shown in (None, "x", [], float("nan"))]


OTHERS += [kept() | {"shown": shown} for shown in (None, [], {"李白": None}, {"李白": {}})]


def test_anything_malformed_is_nothing():
    for text in MALFORMED + list(map(chats.write, OTHERS)):
        assert chats.read(text) == {"role": "", "chats": {}, "shown": {}}, text
    assert all(chats.read_texts(text) == {} for text in MALFORMED)
    assert chats.read_texts('{"a": "b", "c": 5}') == {"a": "b", "c": "5"}


GROWN = {"id": "2", "text": "我是", "base": "b", "state": "cut"}


@pytest.mark.parametrize("versions, grown, ended, after, lost", [
    ([version("")], GROWN, True, [version("我是", "cut", "b")], ""),
    ([version("", "stopped")], {"id": "2", "text": "我"}, False, [version("我", "stopped")], ""),
    ([version("")], GROWN | {"text": " "}, True, None, "问"),
    ([version("")], GROWN | {"text": ""}, False, [version("", "cut", "b")], ""),
    ([version("x"), version("")], GROWN | {"text": ""}, True, [version("x")], ""),
    ([version("")], GROWN | {"id": "4"}, True, [version("")], ""),
    ([version("x")], {}, True, [version("x")], ""),
    (None, GROWN, True, None, ""),
])  # fmt: skip
def test_an_answer_is_kept_as_far_as_it_is_written(versions, grown, ended, after, lost):
    """A question without a word of an answer goes back; other conversations stay as they are."""
    found = kept(turn("问", *versions, shown=len(versions) - 1)) if versions else kept()
    assert chats.settle(found, grown, ended) == lost
    assert found == (kept(turn("问", *after)) if after else kept())


def test_conversations_come_and_go():
    found = chats.read("{}")
    first = chats.open_chat(found, "李白", "来也！")
    assert chats.open_chat(found, "李白", "") is first and (first["greeting"], first["turns"]) == ("来也！", [])
    second, third = (chats.add(found, chats.new_chat("")) for _ in range(2))
    assert len({chat["id"] for chat in (first, second, third)}) == 3 and found["shown"] == {"李白": 2}
    found["shown"]["李白"] = 1
    for left in (third, first):
        chats.remove(found)
        assert chats.open_chat(found, "李白", "") is left
    chats.remove(found)
    assert found == {"role": "李白", "chats": {}, "shown": {}}
    turns = [(0, "question"), (0, "text"), (1, "question"), (1, "text")]  # of the bubbles
    assert [chats.turn_of_bubble(first, bubble) for bubble in range(5)] == [(0, "greeting"), *turns]
    assert [chats.turn_of_bubble(second, bubble) for bubble in range(4)] == turns


@pytest.mark.parametrize("greeted", [True, False])
def test_whole_conversations_become_training_data(greeted):
    found = kept(
        turn("一", version("甲", "cut"), version("乙", "edited"), version("丙"), shown=2),
        turn("二", version("丁"), version("丁"), version("  ")),
        turn("三", version("戊", "stopped"), version("己", "done")),
        turn("四", version("庚")),
    )
    begin = ["来也！"] if greeted else []
    expected = [["早？", "早。"], [*begin, "一", "丙", "二", "丁"], [*begin, "一", "乙"]]
    expected += [[*begin, "一", "丙", "二", "丁", "三", "己"]]
    lines = list(map(json.loads, chats.samples(found, "诗人", greeted).splitlines()))
    assert [[message["content"] for message in line["messages"]] for line in lines] == expected
    roles = [[message["role"] for message in line["messages"]] for line in lines]
    assert all({*of[::-2]} == {"assistant"} and {*of[-2::-2]} == {"user"} for of in roles)
    assert all((line["role"], line["system"]) == ("李白", "诗人") for line in lines)
