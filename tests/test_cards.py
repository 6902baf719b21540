"""Character cards of versions 1 to 3, as JSON and as PNG: a role with its greeting, and its example dialogues."""

import base64
import json

import pytest
from PIL import Image, PngImagePlugin

import data_helper
from data_helper import persona
from support.dialogues.cards import card_conversations, read_card
from support.dialogues.json_files import tell
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


def write_png(path, zip=False, **texts):
    info = PngImagePlugin.PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text, zip=zip)
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


def test_a_book_of_lore_in_a_compressed_chunk(tmp_path):
    lore = {"entries": [{"content": "隆中对。" * 200_000}]}
    card = {**CARDS["2"], "data": {**FIELDS, "character_book": lore}}
    path = write_png(tmp_path / "card.png", zip=True, chara=encoded(card))
    assert len(encoded(card)) > 3 << 20 and path.stat().st_size < 1 << 20
    assert read_characters(path)["诸葛亮"]["description"] == DESCRIPTION


def test_the_nickname_is_what_a_card_calls_its_character(tmp_path, capsys):
    """Also in the examples. Macros for other things than the two names stay, and are told once."""
    examples = "<START>\n{{user}}: {{roll:6}}？\n孔明: {{char}}在。{{// 注}}"
    fields = {**FIELDS, "nickname": "孔明", "mes_example": examples, "scenario": "{{time}}，<BOT>与<user>，{{Time}}"}
    (tmp_path / "card.json").write_text(json.dumps({**CARDS["3"], "data": fields}))
    for _ in range(2):
        ((role, character),) = read_characters(tmp_path / "card.json").items()
    assert role == "诸葛亮" and character["names"] == ["孔明"] and character["greeting"] == "请坐，你。孔明久候了。"
    assert character["description"] == "蜀汉丞相，对方的军师。\n谨慎\n{{time}}，孔明与对方，{{Time}}"
    (example,) = card_conversations(read_card(tmp_path / "card.json"))
    assert example["role"] == "诸葛亮"
    assert [turn["content"] for turn in example["messages"]] == ["{{roll:6}}？", "孔明在。{{// 注}}"]
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2].split(" stays")[0] for line in told] == [
        "{{time}}",
        "{{Time}}",
        "{{roll:6}}",
        "{{// 注}}",
    ]


@pytest.mark.parametrize(
    "examples, left_out",
    [
        ("<START>\n<USER>: 您好\n<BOT>: 亮在此。\n<BOT>: 请坐。", 0),
        ("You: 您好\n诸葛亮: 亮在此。\n诸葛亮：请坐。", 0),
        (
            "<start>\n{{User}}:您好\n{{Char}}:亮在此。\n{{char}}:请坐。\n{{user}}:\n<START>\n{{char}}: 独白\n<START>\n\n",
            1,
        ),
        ("叙述一段\n<START>\nyou: 您好\n诸葛亮: 亮在此。\n{{char}}: 请坐。\n<START>\n{{user}}: \n{{char}}: 无问", 2),
    ],
)
def test_examples_as_people_write_them(tmp_path, capsys, examples, left_out):
    """Two lines of one speaker in a row are joined; how many examples could not be used is told."""
    (tmp_path / "card.json").write_text(json.dumps({**FIELDS, "name": "诸葛亮", "mes_example": examples}))
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "问", "response": "答"}))
    tell.cache_clear()
    paths = ["--train_path", str(tmp_path / "train.json"), "--test_path", str(tmp_path / "test.json")]
    paths += ["--test_conversations", str(tmp_path / "other.jsonl"), "--data_dir", str(tmp_path)]
    data_helper.main(["--conversations", str(tmp_path / "card.json"), *paths])
    (line,) = (tmp_path / "train.json").read_text(encoding="utf-8").splitlines()
    assert [turn["content"] for turn in json.loads(line)["messages"]] == ["您好", "亮在此。\n请坐。"]
    told = f"the card of 诸葛亮: {left_out} of {left_out + 1} examples left out"
    assert (told in capsys.readouterr().err) == (left_out > 0)


def test_a_card_beside_a_profile_of_the_same_role(tmp_path, capsys):
    """Which text is trained is not left to chance."""
    (tmp_path / "card.json").write_text(json.dumps(FIELDS))
    (tmp_path / "profiles-zh_desc.json").write_text(json.dumps({"诸葛亮": "卧龙", "李白": "爱酒"}))
    paths = ["--train_path", str(tmp_path / "train.json"), "--test_path", str(tmp_path / "test.json")]
    command = [
        "--conversations",
        str(tmp_path / "card.json"),
        "--data_dir",
        str(tmp_path),
        "--test_share",
        "0.5",
        *paths,
    ]
    with pytest.raises(SystemExit):
        data_helper.main(command)
    wrong = f"error: {tmp_path}/card.json: '诸葛亮' differs in {tmp_path}/profiles-zh_desc.json: keep one, or add --desc_path"
    assert capsys.readouterr().err.startswith(wrong) and not (tmp_path / "train.json").exists()
    data_helper.main([*command, "--desc_path", str(tmp_path / "card.json")])
    assert persona("诸葛亮", DESCRIPTION) == json.loads((tmp_path / "train.json").read_text())["system"]
    (tmp_path / "profiles-zh_desc.json").write_text(json.dumps({"诸葛亮": DESCRIPTION}))
    data_helper.main(command)


def test_cards_that_cannot_be_used(tmp_path, capsys):
    whole = write_png(tmp_path / "portrait.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:20])
    with_card = write_png(tmp_path / "whole.png", chara=encoded(CARDS["2"])).read_bytes()
    (tmp_path / "half.png").write_bytes(with_card[: len(with_card) // 2])
    (tmp_path / "end.png").write_bytes(with_card[:-30])
    write_png(tmp_path / "text.png", chara=encoded(CARDS["2"])[:-9])
    for suffix in ("jpg", "webp"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"portrait.{suffix}")
    (tmp_path / "nobody.json").write_text(json.dumps({**FIELDS, "name": ""}))
    (tmp_path / "empty.json").write_text(json.dumps({"name": "空", "personality": " "}))
    for name, problem in [
        ("portrait.png", "is a picture without a character card"),
        ("portrait.jpg", "is a picture without a character card"),
        ("portrait.webp", "is a picture without a character card"),
        *(
            (name, "is a damaged picture, or carries a damaged card")
            for name in ("cut.png", "half.png", "end.png", "text.png")
        ),
        ("nobody.json", "the name of '' cannot be"),
        ("empty.json", "the description of '空' cannot be"),
    ]:
        with pytest.raises(UserError) as refused:
            read_characters(tmp_path / name)
        error = refused.value.problems[0]
        assert error.startswith(f"{tmp_path / name}: {problem}")
    quiet = tmp_path / "quiet.json"
    quiet.write_text(json.dumps({**FIELDS, "mes_example": "{{user}}: 您好"}))
    with pytest.raises(SystemExit):
        data_helper.main(["--conversations", str(quiet), "--data_dir", str(tmp_path)])
    assert "no samples for the train file" in capsys.readouterr().err
