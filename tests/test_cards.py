"""Character cards of versions 1 to 3, as JSON and as PNG: a role with its greeting, and its example dialogues."""

import base64
import json

import pytest
from PIL import Image, PngImagePlugin

import data_helper
from data_helper import persona
from support.dialogues.profiles import read_characters
from support.errors import UserError

FIELDS = {
    "name": "诸葛亮",
    "description": "蜀汉丞相，{{user}}的军师。",
    "personality": "谨慎",
    "scenario": "草庐",
    "first_mes": "请坐，{{user}}。{{char}}久候了。",
    "mes_example": "<START>\n{{user}}: 您好\n{{char}}: 亮在此。\r\n羽扇一摇。\n{{user}}: 怕吗？\n{{char}}: 不怕。\n<START>\n{{user}}: 无答\n<START>\n{{user}}:\n{{char}}: 无问。\n"
    "<START>\n{{char}}: 来了？\n{{user}}: 来了。\n诸葛亮：坐。",
}
CARDS = {
    "1": FIELDS,
    "2": {"spec": "chara_card_v2", "spec_version": "2.0", "data": {**FIELDS, "tags": [], "character_book": None}},
    "3": {"spec": "chara_card_v3", "spec_version": "3.0", "data": {**FIELDS, "nickname": ""}, "name": "旧"},
}
DESCRIPTION, GREETING = "蜀汉丞相，对方的军师。\n谨慎\n草庐", "请坐，你。诸葛亮久候了。"


def write_png(path, **texts):
    info = PngImagePlugin.PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


def encoded(card) -> str:
    return base64.b64encode(json.dumps(card, ensure_ascii=False).encode()).decode()


@pytest.fixture(params=[*CARDS, "png, chara", "png, ccv3"])
def card(request, tmp_path):
    if request.param in CARDS:
        path = tmp_path / "card.json"
        path.write_text("\ufeff" + json.dumps(CARDS[request.param], ensure_ascii=False, indent=1), encoding="utf-8")
        return path
    older = {**FIELDS, "name": "旧"}
    texts = (
        {"chara": encoded(CARDS["2"])}
        if "chara" in request.param
        else {"chara": encoded(older), "ccv3": encoded(CARDS["3"])}
    )
    return write_png(tmp_path / "card.png", **texts)


def test_a_card_is_one_role(card):
    (role,) = (characters := read_characters(card))
    assert role == "诸葛亮"
    assert characters[role]["description"] == DESCRIPTION and characters[role]["greeting"] == GREETING
    assert characters[role]["portrait"] == ("card.png" if card.suffix == ".png" else "")


def test_a_card_within_the_file_of_profiles(tmp_path):
    path = tmp_path / "profiles.json"
    path.write_text(json.dumps({"李白": "爱酒", "孔明": CARDS["2"]}), encoding="utf-8")
    characters = read_characters(path)
    assert list(characters) == ["李白", "孔明"]
    assert characters["孔明"]["greeting"] == "请坐，你。孔明久候了。"


@pytest.mark.parametrize(
    "card",
    [
        {
            "char_name": "孔明",
            "char_persona": "丞相",
            "char_greeting": "请坐。",
            "world_scenario": "",
            "example_dialogue": "",
        },
        {"name": "孔明", "description": "丞相", "personality": "", "scenario": ""},
        {"spec": "chara_card_v2", "data": {"name": "孔明", "description": "丞相"}},
    ],
)
def test_a_card_that_is_older_or_has_few_fields(tmp_path, card):
    (tmp_path / "card.json").write_text(json.dumps(card))
    characters = read_characters(tmp_path / "card.json")
    assert list(characters) == ["孔明"] and characters["孔明"]["description"] == "丞相"
    assert characters["孔明"]["greeting"] == ("请坐。" if "char_greeting" in card else "")


def test_the_examples_of_a_card_are_conversations(card, tmp_path):
    train, test = tmp_path / "train.json", tmp_path / "test.json"
    paths = ["--train_path", str(train), "--test_path", str(test), "--data_dir", str(tmp_path)]
    data_helper.main(["--conversations", str(card), "--test_share", "0.5", *paths])
    found = [json.loads(line) for path in (train, test) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(found) == 2 and {sample["system"] for sample in found} == {persona("诸葛亮", DESCRIPTION)}
    texts = sorted([turn["content"] for turn in sample["messages"]] for sample in found)
    assert texts == [["您好", "亮在此。\n羽扇一摇。", "怕吗？", "不怕。"], ["来了？", "来了。", "坐。"]]
    assert {turn["content"]: turn.get("train", True) for sample in found for turn in sample["messages"]}[
        "来了？"
    ] is False


def test_cards_that_cannot_be_used(tmp_path, capsys):
    def problem(path) -> str:
        with pytest.raises(UserError) as refused:
            read_characters(path)
        (line,) = refused.value.problems
        return line

    assert "is a PNG image without a character card" in problem(write_png(tmp_path / "portrait.png"))
    assert "odd.png: is a PNG image, and no character card can be read from it" in problem(
        write_png(tmp_path / "odd.png", chara="?")
    )
    (tmp_path / "cut.png").write_bytes((tmp_path / "portrait.png").read_bytes()[:20])
    assert "cut.png: is a PNG image, and no character card can be read from it" in problem(tmp_path / "cut.png")
    (tmp_path / "list.json").write_text(json.dumps({**FIELDS, "first_mes": ["甲", "乙"]}))
    assert "greeting in the profile of '诸葛亮' is not a string" in problem(tmp_path / "list.json")
    (tmp_path / "object.json").write_text(json.dumps({**FIELDS, "description": {"甲": "乙"}}))
    assert "the profile of '诸葛亮' is not a string" in problem(tmp_path / "object.json")
    (tmp_path / "nobody.json").write_text(json.dumps({**FIELDS, "name": ""}))
    assert "the name of the character card is missing" in problem(tmp_path / "nobody.json")
    (tmp_path / "empty.json").write_text(json.dumps({"name": "空", "first_mes": "", "mes_example": ""}))
    assert "the profile of '空'" in problem(tmp_path / "empty.json")
    (tmp_path / "quiet.json").write_text(json.dumps({**FIELDS, "mes_example": "{{user}}: 您好"}))
    with pytest.raises(SystemExit):
        data_helper.main(["--conversations", str(tmp_path / "quiet.json"), "--data_dir", str(tmp_path)])
    assert "quiet.json: the character card has no example of a question and its answer" in capsys.readouterr().err
