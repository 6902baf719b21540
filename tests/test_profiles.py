"""The file of profiles: a string or an object for each role."""

import json

import pytest
from conftest import ROOT

from support.dialogues.profiles import read_characters
from support.errors import UserError

SAMPLE = ROOT / "data/sample"
PROFILES = "profiles-zh_desc.json"


def test_a_profile_is_a_string_or_an_object(tmp_path):
    full = {
        "description": "好斗",
        "greeting": "来也！",
        "questions": ["几时？"],
        "portrait": "a.png",
        "names": ["翼德"],
    }
    path = tmp_path / PROFILES
    path.write_text(json.dumps({"李白": "爱酒", "张飞": full}), encoding="utf-8")
    empty = {"greeting": "", "questions": [], "portrait": "", "names": []}
    known = {"names": read_characters(SAMPLE / PROFILES)["李白"]["names"]}  # RoleBench's own file has no names
    assert read_characters(path) == {"李白": {"description": "爱酒"} | empty | known, "张飞": full}
    assert len(known["names"]) == 5


@pytest.mark.parametrize(
    "profile, words",
    [
        ({"greeting": "a"}, "the profile of '李白' is missing"),
        ({"description": "a", "greeting": " "}, "greeting in the profile of '李白' is blank"),
        ({"description": "a", "questions": "b"}, "questions in the profile of '李白' is not a list"),
        ({"description": "a", "names": ["b", 5]}, "names in the profile of '李白' is not a string"),
        ({"description": "a", "greetings": "b"}, "greetings in the profile of '李白' is no field"),
    ],
)
def test_a_wrong_field_of_a_profile_is_named(tmp_path, profile, words):
    path = tmp_path / PROFILES
    path.write_text(json.dumps({"李白": profile}, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(UserError, match=f"{PROFILES}:1: {words}"):
        read_characters(path)
