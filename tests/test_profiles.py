"""The file of profiles: a string or an object for each role."""

import json
from types import SimpleNamespace

import pytest
from conftest import ROOT

from support.dialogues.profiles import long_profiles, read_characters
from support.errors import UserError

SAMPLE = ROOT / "data/sample"
EMPTY = {"greeting": "", "questions": [], "portrait": "", "names": []}


def test_a_profile_is_a_string_or_an_object(tmp_path):
    """Line ends become those that a browser sends."""
    full = {
        "description": "好斗",
        "greeting": "来也！",
        "questions": ["几时？"],
        "portrait": "a.png",
        "names": ["翼德"],
    }
    lines = {"description": "甲\r\n乙\r丙\u000b丁\u2028戊", "greeting": "来\r\n了", "questions": ["问\r\n？"]}
    half = {"description": "甲", "greeting": "", "questions": [], "portrait": None, "names": None}
    path = tmp_path / "profiles-zh_desc.json"
    path.write_text(json.dumps({"李白": "爱酒", "张飞": full, "甲": lines, "乙": half, "丙": "丙"}), encoding="utf-8")
    known = {"names": read_characters(SAMPLE / path.name)["李白"]["names"]}  # RoleBench's own file has no names
    assert read_characters(path) == {
        "李白": {"description": "爱酒"} | EMPTY | known,
        "张飞": full,
        "甲": EMPTY | {"description": "甲\n乙\n丙\n丁\n戊", "greeting": "来\n了", "questions": ["问\n？"]},
        "乙": EMPTY | {"description": "甲"},
        "丙": EMPTY | {"description": "丙"},
    }
    assert len(known["names"]) == 5


def test_a_file_that_is_one_profile(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"name": "张飞", "description": "好斗\r\n", "names": ["翼德"]}), encoding="utf-8")
    assert read_characters(path) == {"张飞": EMPTY | {"description": "好斗\n", "names": ["翼德"], "name": "张飞"}}
    for name in ("", 5, None, "李" * 101):
        path.write_text(json.dumps({"name": name, "description": "好斗"}), encoding="utf-8")
        with pytest.raises(UserError, match="profile.json: the name of "):
            read_characters(path)
    path.write_text(json.dumps({"翼德": {"name": "张飞", "description": "好斗"}}), encoding="utf-8")
    with pytest.raises(UserError, match="profile.json: the name of '翼德' cannot be \"张飞\""):
        read_characters(path)
    path.write_text(json.dumps({"description": "好斗", "greeting": "来也！"}), encoding="utf-8")
    with pytest.raises(UserError, match="profile.json: the name of '' cannot be"):
        read_characters(path)


def test_a_wrong_field_of_a_profile_is_named(tmp_path):
    path = tmp_path / "profiles-zh_desc.json"
    good = {"description": "甲" * 8000, "greeting": "a"}
    for role, profile, field in [
        ("李白", {"greeting": "a"}, "description"),
        ("李白", 1, "description"),
        ("李白", " ", "description"),
        ("李白", None, "description"),
        ("李白", "爱\ud800酒", "description"),
        ("李白", {**good, "description": "甲" * 8001}, "description"),
        ("李白", {**good, "greeting": " "}, "greeting"),
        ("李白", {**good, "questions": "b"}, "questions"),
        ("李白", {**good, "names": ["b", 5]}, "names"),
        ("李白", {**good, "greetings": "b"}, "greetings"),
        ("", good, "name"),
        ("李" * 101, good, "name"),
    ]:
        path.write_text(json.dumps({"李" * 100: good, role: profile}), encoding="utf-8")
        with pytest.raises(UserError) as refused:
            read_characters(path)
        (error,) = refused.value.problems
        assert error.startswith(f"{path}: the {field} of {role[:20]!r} cannot be "), (field, error)


def test_a_profile_of_more_than_half_of_the_context_is_told():
    characters = {role: {"description": "酒" * length} for role, length in (("李白", 2000), ("张飞", 2001))}
    told = long_profiles(characters, SimpleNamespace(text_to_ids=list), 4000)
    assert told == ["the profile of 张飞 takes 2,001 of the model's 4,000 tokens: shorten it"]
