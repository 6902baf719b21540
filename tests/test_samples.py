"""Files of samples: every form of a conversation reads the same, and what is none is named."""

import json
import math

import pytest
from conftest import SYSTEM, TWO_ROUNDS, as_written, turns, write_lines

from support.dialogues.samples import read_samples, rounds
from support.errors import UserError


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_older_files_are_read(tmp_path, layout):
    rows = [
        {"instruction": "你是李白。", "input": "好吗？", "output": "好"},
        {"instruction": "写一首诗。", "input": "", "output": "床前"},
    ]
    path = tmp_path / "old.json"
    write_lines(path, *rows) if layout == "lines" else path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    assert [as_written(sample) for sample in read_samples(path)] == [
        {"role": "", "system": "你是李白。", "prompt": "好吗？", "response": "好"},
        {"role": "", "system": "", "prompt": "写一首诗。", "response": "床前"},
    ]


@pytest.mark.parametrize("bad", ["{", "[1]", '{"system": "", "prompt": "好吗？"}', '{"prompt": "好吗？", "output": 1}'])
def test_a_bad_sample_is_named(tmp_path, bad):
    good = '{"system": "", "prompt": "好吗？", "response": "好"}'
    path = tmp_path / "samples.json"
    path.write_text(f"{good}\n{bad}\n", encoding="utf-8")
    with pytest.raises(UserError) as stop:
        list(read_samples(path))
    assert [problem.startswith(f"{path}:2: ") for problem in stop.value.problems] == [True]


@pytest.mark.parametrize(
    "text, where",
    [
        ('{"system": "", "prompt": "a", "response": "b"}\nnot json', "2"),
        ('{"system": "", "prompt": "a"}', "1"),
        ('{"system": "", "prompt": "a", "response": " "}', "1"),
        ('{"system": 1, "prompt": "a", "response": "b"}', "1"),
        ("[1]", " sample 1"),
        ("[", "1"),
        ("[" * 100_000, "1"),
    ],
)
def test_what_is_no_sample_is_named(tmp_path, text, where):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        list(read_samples(path))
    assert error.value.problems[0].startswith(f"{path}:{where}: ")


SPEAKER = {"system": "system", "user": "human", "assistant": "gpt"}


SHAREGPT = [{"from": SPEAKER[turn["role"]], "value": turn["content"]} for turn in [SYSTEM, *TWO_ROUNDS]]


FORMS = {
    "messages": {"role": "孙悟空", "system": "你是孙悟空。", "messages": TWO_ROUNDS},
    "OpenAI": {"role": "孙悟空", "messages": [SYSTEM, *TWO_ROUNDS]},
    "ShareGPT": {"role": "孙悟空", "id": 7, "conversations": SHAREGPT},
    "ShareGPT, system apart": {"role": "孙悟空", "system": "你是孙悟空。", "conversations": SHAREGPT[1:]},
}


@pytest.mark.parametrize("layout", ["lines", "array"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_conversation_reads_the_same(tmp_path, form, layout):
    path = tmp_path / "conversations.json"
    if layout == "lines":
        write_lines(path, FORMS[form])
    else:
        path.write_text("\n" + json.dumps([FORMS[form]], indent=1), encoding="utf-8")
    assert list(read_samples(path)) == [{"role": "孙悟空", "system": "你是孙悟空。", "messages": TWO_ROUNDS}]


def test_one_round_has_a_prompt_and_a_response_as_well(tmp_path):
    path = tmp_path / "one.jsonl"
    write_lines(path, {"messages": TWO_ROUNDS[:2]}, {"prompt": "你使什么兵器？", "response": "金箍棒！"})
    one = {"role": "", "system": "", "messages": TWO_ROUNDS[:2]}
    assert list(read_samples(path)) == [one, one]


def test_turns_that_are_not_to_be_trained(tmp_path):
    path = tmp_path / "some.jsonl"
    messages = [TWO_ROUNDS[0], {**TWO_ROUNDS[1], "train": False}, TWO_ROUNDS[2], {**TWO_ROUNDS[3], "train": True}]
    weighed = [TWO_ROUNDS[0], {**TWO_ROUNDS[1], "weight": 0}, TWO_ROUNDS[2], {**TWO_ROUNDS[3], "weight": 1}]  # OpenAI's
    write_lines(path, {"system": "甲", "messages": messages}, {"system": "甲", "role": None, "messages": weighed})
    sample, same = read_samples(path)
    assert same == sample
    assert sample["messages"] == [*messages[:3], TWO_ROUNDS[3]]
    assert list(rounds(sample)) == [([{"role": "system", "content": "甲"}, *messages[:3]], "东海龙宫！")]


def test_the_rounds_of_a_conversation():
    found = list(rounds({"system": "", "messages": TWO_ROUNDS}))
    assert found == [(TWO_ROUNDS[:1], "金箍棒！"), (TWO_ROUNDS[:3], "东海龙宫！")]


ONE_ROUND = turns("问？", "答。")


ABSENT = {"system": "", "history": [], "messages": None, "conversations": [], "role": None, "type": ""}


HALF_EMPTY = {  # records in which a key holds nothing → their system text
    "Alpaca": ({"instruction": "问？", "input": "", "output": "答。", "system": "", "history": []}, ""),
    "Alpaca with a system text": (
        {"instruction": "问？", "input": "", "output": "答。", "system": "甲", "history": []},
        "甲",
    ),
    "the book's": ({"instruction": "甲", "input": "问？", "output": "答。", "system": None}, "甲"),
    "input with a system text": ({"system": "甲", "instruction": None, "input": "问？", "output": "答。"}, "甲"),
    "prompt": ({**ABSENT, "prompt": "问？", "response": "答。", "instruction": "", "output": None}, ""),
    "messages": ({**ABSENT, "messages": ONE_ROUND}, ""),
    "conversations": ({**ABSENT, "conversations": ONE_ROUND}, ""),
    "turns of ShareGPT under messages": (
        {"messages": [{"from": "human", "value": "问？"}, {"from": "gpt", "value": "答。"}]},
        "",
    ),
    "turns of OpenAI under conversations": ({"conversations": ONE_ROUND}, ""),
    "speakers of the other form": (
        {"messages": [{"role": "human", "content": "问？"}, {"role": "gpt", "content": "答。"}]},
        "",
    ),
    "empty keys in turns": (
        {"messages": [{**ONE_ROUND[0], "from": None, "value": "", "train": None}, {**ONE_ROUND[1], "weight": None}]},
        "",
    ),
    "an empty system turn": ({"messages": [{"role": "system", "content": ""}, *ONE_ROUND]}, ""),
    "mixed": ({"messages": [{"role": "user", "value": "问？"}, {"from": "gpt", "content": "答。"}]}, ""),
    "pandas": ({"prompt": "问？", "response": "答。", "system": math.nan, "messages": math.nan}, ""),
}


@pytest.mark.parametrize("form", HALF_EMPTY)
def test_a_key_that_holds_nothing_is_absent(tmp_path, form):
    record, system = HALF_EMPTY[form]
    expected = {"role": "", "system": system, "messages": ONE_ROUND}
    for text in (json.dumps(record), json.dumps([record])):
        (tmp_path / "one.json").write_text(text)
        assert list(read_samples(tmp_path / "one.json")) == [expected]


def test_a_greeting_before_the_first_question_is_read_and_not_trained(tmp_path):
    path = tmp_path / "download.jsonl"
    turns = [{"role": "assistant", "content": "来也！"}, {"role": "user", "content": "谁？"}]
    turns.append({"role": "assistant", "content": "俺！"})
    path.write_text(json.dumps({"role": "孙悟空", "system": "你是孙悟空。", "messages": turns}), encoding="utf-8")
    (sample,) = read_samples(path)
    assert [turn.get("train", True) for turn in sample["messages"]] == [False, True, True]
    ((asked, answer),) = rounds(sample)
    assert [turn["content"] for turn in asked] == ["你是孙悟空。", "来也！", "谁？"] and answer == "俺！"
