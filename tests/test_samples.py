"""Files of samples: every form of a conversation reads the same, and what is none is named."""

import json
import math

import pytest
from conftest import SYSTEM, TWO_ROUNDS, as_written, turns, write_lines

from support.dialogues.samples import read_samples, rounds
from support.errors import UserError


def written(path, layout, *records):
    """A file of JSON lines, or one array that begins after a blank line."""
    if layout == "lines":
        write_lines(path, *records)
    else:
        path.write_text("\ufeff\n" + json.dumps(records, indent=1), encoding="utf-8")
    return path


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_older_files_are_read(tmp_path, layout):
    rows = [
        {"instruction": "你是李白。", "input": "好吗？", "output": "好"},
        {"instruction": "写一首诗。", "input": "", "output": "床前"},
        {"prompt": "你使什么兵器？", "response": "金箍棒！", "kind": "general"},
    ]
    assert [as_written(sample) for sample in read_samples(written(tmp_path / "old.json", layout, *rows))] == [
        {"role": "", "system": "你是李白。", "prompt": "好吗？", "response": "好"},
        {"role": "", "system": "", "prompt": "写一首诗。", "response": "床前"},
        {"role": "", "system": "", "prompt": "你使什么兵器？", "response": "金箍棒！", "kind": "general"},
    ]


SPEAKER = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": SPEAKER[turn["role"]], "value": turn["content"]} for turn in [SYSTEM, *TWO_ROUNDS]]
FORMS = [
    {"role": "孙悟空", "system": "你是孙悟空。", "messages": TWO_ROUNDS},
    {"role": "孙悟空", "messages": [SYSTEM, *TWO_ROUNDS]},
    {"role": "孙悟空", "id": 7, "conversations": SHAREGPT},
    {"role": "孙悟空", "system": "你是孙悟空。", "conversations": SHAREGPT[1:]},
]


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_every_form_of_a_conversation_reads_the_same(tmp_path, layout):
    expected = {"role": "孙悟空", "system": "你是孙悟空。", "messages": TWO_ROUNDS}
    assert list(read_samples(written(tmp_path / "forms.json", layout, *FORMS))) == [expected] * len(FORMS)


ONE_ROUND = turns("问？", "答。")
ABSENT = {"system": "", "history": [], "messages": None, "conversations": [], "role": None, "type": ""}
ALPACA = {"instruction": "问？", "input": "", "output": "答。", "history": []}
HALF_EMPTY = [  # records in which a key holds nothing, or in which the forms are mixed, and their system text
    ({**ALPACA, "system": ""}, ""),
    ({**ALPACA, "system": "甲"}, "甲"),
    ({"instruction": "甲", "input": "问？", "output": "答。", "system": None}, "甲"),  # the book's
    ({"system": "甲", "instruction": None, "input": "问？", "output": "答。"}, "甲"),
    ({**ABSENT, "prompt": "问？", "response": "答。", "instruction": "", "output": None}, ""),
    ({**ABSENT, "messages": ONE_ROUND}, ""),
    ({**ABSENT, "conversations": ONE_ROUND}, ""),
    ({"messages": [{"from": "human", "value": "问？"}, {"from": "gpt", "value": "答。"}]}, ""),
    ({"messages": [{"role": "human", "value": "问？"}, {"from": "gpt", "content": "答。"}]}, ""),
    ({"messages": [{**ONE_ROUND[0], "from": None, "value": "", "train": None}, {**ONE_ROUND[1], "weight": None}]}, ""),
    ({"messages": [{"role": "system", "content": ""}, *ONE_ROUND]}, ""),
    ({"prompt": "问？", "response": "答。", "system": math.nan, "messages": math.nan}, ""),  # as pandas writes it
]


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_a_key_that_holds_nothing_is_absent(tmp_path, layout):
    records, systems = zip(*HALF_EMPTY)
    found = list(read_samples(written(tmp_path / "some.json", layout, *records)))
    assert found == [{"role": "", "system": system, "messages": ONE_ROUND} for system in systems]


def test_turns_that_are_not_to_be_trained(tmp_path):
    path = tmp_path / "some.jsonl"
    messages = [TWO_ROUNDS[0], {**TWO_ROUNDS[1], "train": False}, TWO_ROUNDS[2], {**TWO_ROUNDS[3], "train": True}]
    weighed = [TWO_ROUNDS[0], {**TWO_ROUNDS[1], "weight": 0}, TWO_ROUNDS[2], {**TWO_ROUNDS[3], "weight": 1}]  # OpenAI's
    write_lines(path, {"system": "甲", "messages": messages}, {"system": "甲", "role": None, "messages": weighed})
    sample, same = read_samples(path)
    assert same == sample
    assert sample["messages"] == [*messages[:3], TWO_ROUNDS[3]]
    assert list(rounds(sample)) == [([{"role": "system", "content": "甲"}, *messages[:3]], "东海龙宫！")]


def test_a_greeting_before_the_first_question_is_read_and_not_trained(tmp_path):
    messages = [{"role": "assistant", "content": "来也！"}, *turns("谁？", "俺！")]
    write_lines(tmp_path / "download.jsonl", {"system": "你是孙悟空。", "messages": messages})
    (sample,) = read_samples(tmp_path / "download.jsonl")
    assert [turn.get("train", True) for turn in sample["messages"]] == [False, True, True]
    ((asked, answer),) = rounds(sample)
    assert [turn["content"] for turn in asked] == ["你是孙悟空。", "来也！", "谁？"] and answer == "俺！"


# ---------------------------------------------------------------- what is no sample

USER, ASSISTANT = turns("问", "答")
UNTRAINED = {**ASSISTANT, "train": False}
BAD_TURNS = [  # (turns, the number of the wrong one)
    ([USER, USER, ASSISTANT], 2),
    ([USER, ASSISTANT, ASSISTANT], 3),
    ([ASSISTANT, ASSISTANT], 2),
    ([USER, SYSTEM, ASSISTANT], 2),
    ([SYSTEM, SYSTEM, USER, ASSISTANT], 2),
    ([USER, {"role": "tool", "content": "答"}], 2),
    ([USER, {"content": "答"}], 2),
    ([USER, {**ASSISTANT, "content": " "}], 2),
    ([USER, {**ASSISTANT, "content": [1]}], 2),
    ([USER, {**ASSISTANT, "train": "no"}], 2),
    ([USER, "答"], 2),
    ("问", 1),
]
BAD_RECORDS = [  # (record, what the error says)
    ({"messages": [SYSTEM, USER, ASSISTANT], "system": "甲"}, "turn 1 cannot be"),
    *(({"messages": [*messages]}, "does not end on an answer") for messages in ([USER], [*TWO_ROUNDS, USER], [SYSTEM])),
    ({"messages": [USER, UNTRAINED]}, "does not end on an answer, or trains none"),
    ({"messages": [USER, ASSISTANT], "system": 1}, '"system" is missing, blank, no string'),
    ({"messages": [USER, ASSISTANT], "role": 1}, '"role" is missing, blank, no string'),
    ({"prompt": "问", "response": " "}, '"response" is missing, blank'),
    ({"prompt": "问", "output": 1}, "no sample has the keys (prompt, output)"),
    ({"prompt": "问", "response": ""}, "no sample has the keys (prompt)"),
    ({"instruction": "问", "output": "答", "history": [["问", "答"]]}, "no sample has the keys"),
    ({"instruction": "扮演", "prompt": "问", "response": "答"}, "no sample has the keys"),
    ({"system": "甲", "instruction": "乙", "input": "问", "output": "答"}, "no sample has the keys"),
    ([1], "is not a JSON object"),
]


def test_what_is_no_sample_is_named(tmp_path):
    path, good = tmp_path / "samples.json", {"messages": [USER, ASSISTANT]}
    for record, problem in [
        *(({"messages": messages}, f"turn {number} cannot be") for messages, number in BAD_TURNS),
        *BAD_RECORDS,
    ]:
        for layout, where in (("lines", ":2: "), ("array", ": sample 2: ")):
            with pytest.raises(UserError) as stop:
                list(read_samples(written(path, layout, good, record, good)))
            (error,) = stop.value.problems
            assert error.startswith(f"{path}{where}{problem}"), (record, error)
    for text in ("[", "[" * 100_000, '[\n{"prompt"}]'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"samples.json:[12]: is not a JSON object in UTF-8"):
            list(read_samples(path))
