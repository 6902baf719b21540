"""Files of samples: every form of a conversation reads the same, and what is none is named."""

import json
import math

import pytest
from conftest import SYSTEM, TWO_ROUNDS, as_written, turns, write_lines

from support.dialogues.samples import first_question, read_rolebench, read_samples, rounds, split_off
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
    {"role": "孙悟空", "system": "你是孙悟空。", "messages": [SYSTEM, *TWO_ROUNDS]},  # said twice, alike
    {"role": "孙悟空", "conversations": [{**turn, "from": turn["from"].upper()} for turn in SHAREGPT]},
    {
        "role": "孙悟空",
        "messages": [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in [SYSTEM, *TWO_ROUNDS]
        ],
    },
    {
        "role": "孙悟空",
        "system": "你是孙悟空。",
        "query": "那它是从哪儿得来的？",
        "response": "东海龙宫！",
        "history": [["你使什么兵器？", "金箍棒！"]],
    },
]


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_every_form_of_a_conversation_reads_the_same(tmp_path, layout):
    expected = {"role": "孙悟空", "system": "你是孙悟空。", "messages": TWO_ROUNDS}
    assert list(read_samples(written(tmp_path / "forms.json", layout, *FORMS))) == [expected] * len(FORMS)
    for form in FORMS:  # a file of its own: one object over several lines
        (tmp_path / "one.json").write_text(json.dumps(form, indent=1))
        assert list(read_samples(tmp_path / "one.json")) == [expected]


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
    ({"prompt": "问？", "completion": "答。", "label": True, "rejected": None}, ""),  # TRL's
    ({"query": "问？", "response": "答。", "system": "甲", "history": []}, "甲"),  # ms-swift's
    ({"messages": [{**ONE_ROUND[0], "name": "甲", "id": 1}, {**ONE_ROUND[1], "tool_calls": None, "timestamp": 2}]}, ""),
    ({"messages": [{"role": "developer", "content": "甲"}, ONE_ROUND[0], {"from": "ChatGPT", "value": "答。"}]}, "甲"),
    (
        {
            "messages": [
                ONE_ROUND[0],
                {"role": "model", "content": "答。", "weight": 1, "loss": "True", "training": 1.0},
            ]
        },
        "",
    ),
    ({"messages": [ONE_ROUND[0], {"role": "bot", "content": "答。"}], "kto_tag": True, "label": "历史", "id": 7}, ""),
]


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_a_key_that_holds_nothing_is_absent(tmp_path, layout):
    records, systems = zip(*HALF_EMPTY)
    found = list(read_samples(written(tmp_path / "some.json", layout, *records)))
    assert found == [{"role": "", "system": system, "messages": ONE_ROUND} for system in systems]


MARKED = [("train", False), ("train", "no"), ("weight", 0), ("weight", "0"), ("loss", False), ("loss", 0.0)]
MARKED += [("loss", "False"), ("training", False), ("Training", "false")]


def test_turns_that_are_not_to_be_trained(tmp_path):
    path = tmp_path / "some.jsonl"
    messages = [TWO_ROUNDS[0], {**TWO_ROUNDS[1], "train": False}, *TWO_ROUNDS[2:]]
    marked = [[TWO_ROUNDS[0], {**TWO_ROUNDS[1], key: value}, *TWO_ROUNDS[2:]] for key, value in MARKED]
    write_lines(
        path,
        {"system": "甲", "prompt": messages[:3], "completion": [TWO_ROUNDS[3]]},  # TRL learns the completion alone
        *({"system": "甲", "role": None, "messages": [*turns, {**last, "train": True}]} for *turns, last in marked),
    )
    for sample in read_samples(path):
        assert sample["messages"] == messages
        assert list(rounds(sample)) == [([{"role": "system", "content": "甲"}, *messages[:3]], "东海龙宫！")]
    whole = [("kto_tag", False), ("label", 0), *MARKED]
    write_lines(path, {"messages": [USER, UNTRAINED]}, *({"messages": TWO_ROUNDS, key: value} for key, value in whole))
    assert [list(rounds(sample)) for sample in read_samples(path)] == [[]] * (1 + len(whole))


def test_keys_that_do_not_mark_what_is_learned_are_told_once(tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    turns = [{**USER, "train": True, "weight": 0}, {**ASSISTANT, "emotion": "喜", "constraints": [1], "name": "甲"}]
    write_lines(path, *[{"messages": turns, "source": "x"}] * 3)
    for _ in range(2):
        assert [sample["messages"] for sample in read_samples(path)] == [[USER, ASSISTANT]] * 3
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" is not read")[0] for line in told] == [
        f'warning: {path}: "train" in turns of the user',
        f'warning: {path}: "emotion" in turns of the assistant',
        f'warning: {path}: "constraints" in turns of the assistant',
    ]


def test_line_ends_are_those_that_the_page_sends(tmp_path):
    ends = ["甲\r\n乙", "甲\r乙", "甲\u2028乙", "甲\x85乙", "甲\n乙"]
    for end in ends:
        records = [
            {"system": end, "messages": turns(end, end)},
            {"messages": [{"role": "system", "content": end}, *turns(end, end)]},
            {"instruction": end, "input": end, "output": end},
        ]
        write_lines(tmp_path / "some.jsonl", *records)
        expected = {"role": "", "system": "甲\n乙", "messages": turns("甲\n乙", "甲\n乙")}
        assert list(read_samples(tmp_path / "some.jsonl")) == [expected] * len(records)
    write_lines(tmp_path / "rolebench.jsonl", *({"role": "甲", "question": end, "generated": [end]} for end in ends))
    for row in read_rolebench(tmp_path / "rolebench.jsonl"):
        assert (row["question"], row["generated"]) == ("甲\n乙", ["甲\n乙"])


def test_a_greeting_before_the_first_question_is_read_and_not_trained(tmp_path):
    messages = [{"role": "assistant", "content": "来也！"}, *turns("谁？", "俺！")]
    write_lines(tmp_path / "download.jsonl", {"system": "你是孙悟空。", "messages": messages})
    (sample,) = read_samples(tmp_path / "download.jsonl")
    assert [turn.get("train", True) for turn in sample["messages"]] == [False, True, True]
    ((asked, answer),) = rounds(sample)
    assert [turn["content"] for turn in asked] == ["你是孙悟空。", "来也！", "谁？"] and answer == "俺！"


def test_a_log_of_sillytavern_is_one_conversation(tmp_path):
    """Its first line is about the chat; of several answers the shown one counts; what is hidden from the model does not."""
    path = tmp_path / "张飞 - 2026-1-2.jsonl"
    head = {
        "user_name": "阿明",
        "character_name": "unused",
        "create_date": "2026-1-2",
        "chat_metadata": {"tainted": True},
    }

    def line(name, text, **others):
        return {"name": name, "is_user": name == "阿明", "is_system": False, "mes": text, "extra": {}} | others

    lines = [
        line("张飞", "来者何人？", swipes=["去！", "来者何人？"], swipe_id=1),
        line("阿明", "问1\r\n？"),
        line("张飞", "乙", swipes=["甲", "乙", "丙"], swipe_id=1),
        line("张飞", "隐去", is_system=True),
        line("阿明", "问2"),
        line("张飞", "答2", swipe_id=0, swipes=[]),
    ]
    messages = turns("", "来者何人？", "问1\n？", "乙", "问2", "答2")[1:]
    messages[0]["train"] = False
    for records in ([head, *lines], lines):
        write_lines(path, *records)
        assert list(read_samples(path)) == [{"role": "张飞", "system": "", "messages": messages}]
    for more, problem in [
        ([line("关羽", "某")], "several characters speak, 关羽, 张飞: "),
        ([line("阿明", "问3")], "its chat: does not go from a question to an answer"),
        ([line("张飞", "又答")], "its chat: turn 6 cannot be"),
        ([line(["张飞"], "又答")], "is no log of a chat"),
    ]:
        write_lines(path, head, *lines, *more)
        with pytest.raises(UserError) as stop:
            list(read_samples(path))
        assert stop.value.problems[0].startswith(f"{path}: {problem}")
    write_lines(path, head, *lines, line("张飞", "又答"))
    (sample,) = read_samples(path, merge=True)
    assert sample["messages"][-1]["content"] == "答2\n又答"


# ---------------------------------------------------------------- what is no sample

USER, ASSISTANT = turns("问", "答")
UNTRAINED = {**ASSISTANT, "train": False}
UNCLEAR = ["train", "weight", "loss", "train_detail", "loss_scale", "is_masked"]
BAD_TURNS = [  # (turns, the number of the wrong one)
    ([USER, USER, ASSISTANT], 2),
    ([USER, ASSISTANT, ASSISTANT], 3),
    ([ASSISTANT, ASSISTANT], 2),
    ([USER, SYSTEM, ASSISTANT], 2),
    ([SYSTEM, SYSTEM, USER, ASSISTANT], 2),
    ([USER, {"role": "narrator", "content": "答"}], 2),
    ([USER, {"content": "答"}], 2),
    ([USER, {**ASSISTANT, "content": " "}], 2),
    ([USER, {**ASSISTANT, "content": [1]}], 2),
    ([USER, {**ASSISTANT, "content": [{"type": "text", "text": "答"}, {"type": "image_url", "image_url": {}}]}], 2),
    ([USER, "答"], 2),
    ("问", 1),
]
BAD_RECORDS = [  # (record, what the error says)
    ({"messages": [SYSTEM, USER, ASSISTANT], "system": "甲"}, "turn 1 cannot be"),
    *(
        ({"messages": messages}, "does not go from a")
        for messages in ([USER], [*TWO_ROUNDS, USER], [SYSTEM], [ASSISTANT])
    ),
    *(({"messages": [USER, {**ASSISTANT, key: 0.5}]}, f'turn 2: "{key}" may say what is learned') for key in UNCLEAR),
    *(({"messages": TWO_ROUNDS, key: [0]}, f'"{key}" may say what is learned') for key in UNCLEAR),
    *(({"messages": TWO_ROUNDS, key: "坏"}, f'"{key}" belongs to pairs') for key in ("rejected", "rejected_response")),
    ({"prompt": "问", "chosen": "答", "rejected": "坏"}, '"chosen" belongs to pairs'),
    ({"messages": TWO_ROUNDS, "tools": "[{}]"}, '"tools" belongs to calls of tools'),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, 'turn 2: "tool_calls" belongs to calls of tools'),
    *(({"messages": [USER, {"role": name}]}, f'turn 2: "{name}" belongs to calls') for name in ("tool", "observation")),
    ({"prompt": [USER], "completion": "答"}, '"prompt" is missing, blank, no string'),
    ({"prompt": [1], "completion": [ASSISTANT]}, "turn 1 cannot be 1"),
    ({"query": "问", "response": "答", "history": ["问", "答"]}, "no sample has the keys"),
    ({"query": "问", "response": "答", "history": [["问", 5]]}, "turn 2 cannot be"),
    ({"data": [{"messages": TWO_ROUNDS}]}, "no sample has the keys (data)"),
    ({"messages": [USER, ASSISTANT], "system": 1}, '"system" is missing, blank, no string'),
    ({"messages": [USER, ASSISTANT], "role": 1}, '"role" is missing, blank, no string'),
    ({"prompt": "问", "response": " "}, '"response" is missing, blank'),
    ({"prompt": "问", "output": 1}, "no sample has the keys (prompt, output)"),
    ({"prompt": "问", "response": ""}, "no sample has the keys (prompt)"),
    ({"instruction": "甲", "input": "问", "output": "答", "history": [["问", "答"]]}, "no sample has the keys"),
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
    for text in ("[", "[" * 100_000, '[\n{"prompt"}]', '{\n"prompt"}', '{"prompt": "问"'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"samples.json:[12]: is not a JSON object in UTF-8"):
            list(read_samples(path))


def test_samples_that_open_alike_stay_together():
    samples = [{"role": "李白", "messages": turns(f"问{n % 10}", f"答{n}")} for n in range(40)]
    parts = split_off(samples, 0.5, seed=1)
    train, test = ({first_question(sample["messages"]) for sample in part} for part in parts.values())
    assert not train & test and [len(part) for part in parts.values()] == [20, 20]
