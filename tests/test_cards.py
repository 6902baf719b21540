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
    "mes_example": "<START>\n{{user}}: 您好\n{{char}}: 亮在此。\r\n羽扇一摇。\n{{user}}: 怕吗？\n{{char}}: 不怕。\n"
    "<START>\n{{user}}: 无答\n<START>\n{{user}}:\n{{char}}: 无问。\n"
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
    if request.param == "png, chara":
        return write_png(tmp_path / "card.png", chara=encoded(CARDS["2"]))
    return write_png(tmp_path / "card.png", chara=encoded({**FIELDS, "name": "旧"}), ccv3=encoded(CARDS["3"]))


def test_a_card_is_one_role(card):
    portrait = "card.png" if card.suffix == ".png" else ""
    expected = {"description": DESCRIPTION, "greeting": GREETING, "portrait": portrait, "questions": [], "names": []}
    assert read_characters(card) == {"诸葛亮": expected}


def test_a_card_within_the_file_of_profiles(tmp_path):
    path = tmp_path / "profiles.json"
    path.write_text(json.dumps({"李白": "爱酒", "孔明": CARDS["2"]}), encoding="utf-8")
    characters = read_characters(path)
    assert list(characters) == ["李白", "孔明"]
    assert characters["孔明"]["greeting"] == "请坐，你。孔明久候了。"


def test_a_card_that_has_few_fields(tmp_path):
    few = {"name": "孔明", "description": "丞相"}
    for card in ({**few, "personality": "", "scenario": "", "first_mes": ""}, {"spec": "chara_card_v2", "data": few}):
        (tmp_path / "card.json").write_text(json.dumps(card))
        ((role, character),) = read_characters(tmp_path / "card.json").items()
        assert (role, character["description"], character["greeting"]) == ("孔明", "丞相", "")


def test_the_examples_of_a_card_are_conversations(card, tmp_path):
    train, test = tmp_path / "train.json", tmp_path / "test.json"
    paths = ["--train_path", str(train), "--test_path", str(test), "--data_dir", str(tmp_path)]
    data_helper.main(["--conversations", str(card), "--test_share", "0.5", *paths])
    found = [json.loads(line) for path in (train, test) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(found) == 2 and {sample["system"] for sample in found} == {persona("诸葛亮", DESCRIPTION)}
    texts = sorted([turn["content"] for turn in sample["messages"]] for sample in found)
    assert texts == [["您好", "亮在此。\n羽扇一摇。", "怕吗？", "不怕。"], ["来了？", "来了。", "坐。"]]
    untrained = [turn["content"] for sample in found for turn in sample["messages"] if "train" in turn]
    assert untrained == ["来了？"]


def test_cards_that_cannot_be_used(tmp_path, capsys):
    write_png(tmp_path / "portrait.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "portrait.png").read_bytes()[:20])
    (tmp_path / "nobody.json").write_text(json.dumps({**FIELDS, "name": ""}))
    (tmp_path / "empty.json").write_text(json.dumps({"name": "空", "personality": " "}))
    for name, problem in [
        ("portrait.png", "is a PNG image, where a text is needed"),
        ("cut.png", "is a damaged PNG image"),
        ("nobody.json", "the description of 'name' cannot be"),
        ("empty.json", "the description of '空' cannot be"),
    ]:
        with pytest.raises(UserError) as refused:
            read_characters(tmp_path / name)
        (error,) = refused.value.problems
        assert error.startswith(f"{tmp_path / name}: {problem}")
    quiet = tmp_path / "quiet.json"
    quiet.write_text(json.dumps({**FIELDS, "mes_example": "{{user}}: 您好"}))
    with pytest.raises(SystemExit):
        data_helper.main(["--conversations", str(quiet), "--data_dir", str(tmp_path)])
    assert "no samples for the train file" in capsys.readouterr().err
