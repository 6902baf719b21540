"""data_helper.py: addresses, draws, validation, downloading, and the sample it is tried with."""

import gzip
import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from conftest import SYSTEM, TWO_ROUNDS, as_written, turns, write_lines

from data_helper import PERSONA, example_questions, main, persona, without_address
from support.dialogues.profiles import read_characters
from support.dialogues.samples import read_samples, rounds
from support.errors import UserError

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "data/sample"
ROLEBENCH = ROOT.parent / "shared/rolebench"  # the real files, where they are at hand
REAL = [ROLEBENCH] if ROLEBENCH.is_dir() else []
TOKENIZER = ROOT.parent / "shared/baichuan2-7b-chat/tokenizer.model"
FIVE = ["孙悟空", "李白", "张飞", "皇帝", "华妃"]
NAMES = [f"rolebench-zh_{kind}_{split}.jsonl" for split in ("train", "test") for kind in ("role_specific", "general")]


def read_lines(path):
    text = path.read_bytes().decode("utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]  # splitlines() would also cut at U+2028


def files_below(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def names_of(role):
    """As the sample's profiles have them."""
    return [role, *read_characters(SAMPLE / "profiles-zh_desc.json").get(role, {}).get("names", [])]


class Run:
    """A data directory with one good line in every file, and data_helper.py run over it."""

    def __init__(self, directory, capsys):
        self.data, self.out, self.capsys = directory / "in", directory / "out", capsys
        self.train, self.test = self.out / "train.json", self.out / "test.json"
        self.data.mkdir()
        (self.data / "profiles-zh_desc.json").write_text('{\n"李白": "爱酒",\n"张飞": "好斗"\n}', encoding="utf-8")
        for name in NAMES:
            write_lines(self.data / name, {"role": "李白", "question": f"李白，{name}吗？", "generated": [f"答{name}"]})

    def __call__(self, *flags, data_dir=None, roles=("李白",)):
        self.train.unlink(missing_ok=True)
        self.test.unlink(missing_ok=True)
        paths = ["--train_path", str(self.train), "--test_path", str(self.test)]
        main(["--data_dir", str(data_dir or self.data), *paths, "--roles", *roles, *flags])
        return read_lines(self.train), read_lines(self.test)

    def errors(self, *flags, **options):
        """The lines on stderr of a run that must fail with status 2 and write nothing."""
        with pytest.raises(SystemExit) as stop:
            self(*flags, **options)
        assert stop.value.code == 2
        assert not self.out.exists() or not files_below(self.out)
        lines = self.capsys.readouterr().err.splitlines()
        assert lines and all(line.startswith("error: ") for line in lines)
        return [line.removeprefix("error: ") for line in lines]


@pytest.fixture
def run(tmp_path, capsys):
    return Run(tmp_path, capsys)


# ---------------------------------------------------------------- the text of a sample


def test_the_lines_of_both_files(run):
    profile = "斗酒诗百篇"
    (run.data / "profiles-zh_desc.json").write_text(json.dumps({"李白": profile}), encoding="utf-8")
    write_lines(
        run.data / NAMES[0],
        {"role": "李白", "question": "李白先生，醉了，怎么办？ ", "generated": ["再饮，"], "type": "script_agnostic"},
    )
    write_lines(run.data / NAMES[1], {"role": "李白", "question": "李白，是谁？\n", "generated": [" 是我", "我"]})
    train, test = run()
    system = PERSONA.replace("{role}", "李白").replace("{description}", profile)
    assert train == [
        {"role": "李白", "system": system, "prompt": "醉了，怎么办？ ", "response": "再饮，"},
        {"role": "李白", "system": system, "prompt": "李白，是谁？\n", "response": " 是我"},
        {"role": "李白", "system": system, "prompt": "李白，是谁？\n", "response": "我"},
    ]
    assert [list(line) for line in train] == [["role", "system", "prompt", "response"]] * 3
    assert [line["prompt"] for line in test] == [f"{NAMES[2]}吗？", f"李白，{NAMES[3]}吗？"]
    assert "李白" in run.train.read_text(encoding="utf-8")  # not \u674e\u767d
    assert re.search(r"3\s+2\s+李白\n\s+3\s+2 .*train\.json.*test\.json", run.capsys.readouterr().out)


def test_persona_takes_any_profile():
    assert persona("李白", "爱{酒}与{0}、{role}、100%") == PERSONA.replace("{role}", "李白").replace(
        "{description}", "爱{酒}与{0}、{role}、100%"
    )
    assert persona("李白", "爱酒").count("爱酒") == 1
    assert "语言模型" in PERSONA and "啰嗦" in PERSONA and "生硬" in PERSONA


CUT = [
    ("孙悟空", "孙悟空，你从哪里来，到哪里去？", "你从哪里来，到哪里去？"),
    ("孙悟空", "孙大圣，打得过他吗？", "打得过他吗？"),
    ("孙悟空", "孙悟空大圣，打得过他吗？", "打得过他吗？"),
    ("孙悟空", "齐天大圣孙悟空，打得过他吗？", "打得过他吗？"),
    ("孙悟空", "孙悟空,你饿了吗？", "你饿了吗？"),
    ("孙悟空", "孙悟空：你饿了吗？", "你饿了吗？"),
    ("孙悟空", "大圣！你饿了吗？", "你饿了吗？"),
    ("孙悟空", "孙悟空，孙悟空是谁起的名字？", "孙悟空是谁起的名字？"),
    ("李白", "李白先生， 您写诗吗？\n", "您写诗吗？\n"),
    ("李白", "亲爱的李白，您写诗吗？", "您写诗吗？"),
    ("张飞", "张将军，累不累？", "累不累？"),
    ("张飞", "张飞将军，累不累？", "累不累？"),
    ("张飞", "张翼德，累不累？", "累不累？"),
    ("皇帝", " 陛下，请问您安好吗？ ", "请问您安好吗？ "),
    ("皇帝", "皇上，华妃，她在哪里？", "华妃，她在哪里？"),
    ("皇帝", "皇帝陛下，您安好吗？", "您安好吗？"),
    ("皇帝", "陛下殿下，您安好吗？", "您安好吗？"),
    ("华妃", "华妃娘娘，冷吗？", "冷吗？"),
    ("华妃", "华妃殿下，冷吗？", "冷吗？"),
    ("诸葛亮", "诸葛亮先生，冷吗？", "冷吗？"),  # a role that the sample does not have
    ("A.I. (v1)", "A.I. (v1), ready?", "ready?"),
]
WHOLE = [
    ("李白", "在剧中，你为什么不见他？"),
    ("李白", "你是谁，从哪里来？"),
    ("李白", "李白的诗，你背得出吗？"),
    ("张飞", "张飞将要出征，你去不去？"),
    ("张飞", "张飞、关羽谁更勇，你说说？"),
    ("张飞", "关羽，你的二哥，在哪里？"),
    ("皇帝", "皇上对此事怎么看，为什么？"),
    ("华妃", "皇上，是你最爱的人吗？"),  # another role's name
    ("诸葛亮", "军师，冷吗？"),
    ("孙悟空", "孙悟空，"),
    ("孙悟空", "孙悟空！！！"),
    ("皇帝", "陛下， "),
    ("A.I. (v1)", "AxIx (v1), ready?"),
]


@pytest.mark.parametrize("role, question, prompt", CUT + [(role, whole, whole) for role, whole in WHOLE])
def test_an_address_and_nothing_else_is_cut(role, question, prompt):
    assert without_address(question, names_of(role)) == prompt


def test_a_question_of_titles_alone_takes_no_time():
    question = "张飞" + "将军" * 50_000
    assert without_address(question, names_of("张飞")) == question


# ---------------------------------------------------------------- roles, draws, order


def test_default_roles_and_all(run):
    defaults = FIVE[:3]
    train, test = run(data_dir=SAMPLE, roles=defaults)
    assert {line["role"] for line in train} == {line["role"] for line in test} == set(defaults)
    paths = ["--train_path", str(run.train), "--test_path", str(run.test)]
    main(["--data_dir", str(SAMPLE), *paths])  # without --roles
    assert (read_lines(run.train), read_lines(run.test)) == (train, test)
    every, _ = run(data_dir=SAMPLE, roles=["all"])
    assert {line["role"] for line in every} == set(FIVE)
    run.capsys.readouterr()
    twice, _ = run(data_dir=SAMPLE, roles=["李白", "李白"])
    assert run.capsys.readouterr().out.count("李白") == 1
    assert twice == [line for line in every if line["role"] == "李白"]


@pytest.mark.parametrize("data_dir", [SAMPLE, *REAL], ids=lambda path: path.name)
def test_order_is_that_of_the_files(run, data_dir):
    train, _ = run("--max_responses", "1", data_dir=data_dir, roles=["all"])
    rows = [row for name in NAMES[:2] for row in read_lines(data_dir / name)]
    assert [line["role"] for line in train] == [row["role"] for row in rows]
    assert all(line["response"] in row["generated"] for line, row in zip(train, rows))
    assert all(row["question"].endswith(line["prompt"]) for line, row in zip(train, rows))


def test_draws_follow_the_seed_and_nothing_else(run):
    rows = [{"role": role, "question": f"问{n}", "generated": list("甲乙丙丁戊")} for role in FIVE for n in range(40)]
    profiles = {role: "有名的人" for role in FIVE}
    (run.data / "profiles-zh_desc.json").write_text(json.dumps(profiles), encoding="utf-8")
    write_lines(run.data / NAMES[1], *rows)

    def drawn(*flags, roles):
        return [(line["role"], line["prompt"], line["response"]) for line in run(*flags, roles=roles)[0]][1:]

    drawn(roles=["all"])
    first = run.train.read_bytes(), run.test.read_bytes()
    everyone = drawn(roles=["all"])
    assert (run.train.read_bytes(), run.test.read_bytes()) == first
    assert drawn("--seed", "1235", roles=["all"]) != everyone
    assert [line for line in everyone if line[0] == "李白"] == drawn(roles=["李白"])[-80:]

    assert len(set(everyone)) == len(everyone) == 400  # two different answers a question
    counts = Counter(answer for _, _, answer in everyone)
    assert len(counts) == 5 and all(50 < count < 110 for count in counts.values()), counts  # 80 on average
    assert len(drawn("--max_responses", "1", roles=["all"])) == 200
    assert drawn("--max_responses", "9", roles=["all"])[:5] == [("孙悟空", "问0", answer) for answer in "甲乙丙丁戊"]


def test_python_hash_seed_does_not_matter(tmp_path):
    """Two processes, as a user runs them, write the same bytes."""
    for hash_seed in ("1", "2"):
        out = tmp_path / hash_seed
        flags = ["--data_dir", SAMPLE, "--train_path", out / "train.json", "--test_path", out / "test.json"]
        command = [sys.executable, ROOT / "data_helper.py", *flags, "--max_responses", "1"]
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert (result.returncode, result.stderr) == (0, "")
    assert files_below(tmp_path) == {"1/train.json", "1/test.json", "2/train.json", "2/test.json"}
    assert (tmp_path / "1/train.json").read_bytes() == (tmp_path / "2/train.json").read_bytes() != b""


def test_default_outputs_do_not_follow_data_dir(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files_below(run.data)
    main(["--data_dir", "in", "--roles", "李白"])
    assert files_below(tmp_path / "data") == {"train.json", "test.json"}
    assert files_below(run.data) == before


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in "data_dir desc_path train_path test_path roles max_responses seed download".split():
        assert re.search(rf"--{flag}( [A-Z\[][^a-z]*)? [a-zA-Z ]{{10}}", text), flag
    assert "None" not in text


# ---------------------------------------------------------------- the real files


@pytest.mark.parametrize("data_dir", REAL, ids=lambda path: path.name)
def test_rolebench_counts(run, data_dir):
    train, test = run(data_dir=data_dir, roles=FIVE[:3])
    assert len(train) == 8020
    assert Counter(line["role"] for line in train[:1003]) == {"孙悟空": 350, "李白": 290, "张飞": 363}
    questions = [{row["question"] for row in read_lines(data_dir / name)} for name in NAMES[:2]]
    assert all(line["prompt"] in questions[1] for line in train[1003:])  # general ones are never touched
    assert all(line["prompt"].strip() for line in train + test)


@pytest.mark.parametrize("data_dir", REAL, ids=lambda path: path.name)
def test_rolebench_addresses(data_dir):
    cut, whole = Counter(), []
    for name in (NAMES[0], NAMES[2]):
        for number, row in enumerate(read_lines(data_dir / name), start=1):
            prompt = without_address(row["question"], names_of(row["role"]))
            assert prompt and row["question"].endswith(prompt)
            if prompt == row["question"]:
                whole.append((name, number))
            cut[row["question"].removesuffix(prompt)] += 1
    # Counted by hand, with grep -c '"question": "陛下，' and the like.
    assert cut == {
        "孙悟空，": 358, "孙悟空大圣，": 2, "孙大圣，": 2,
        "李白，": 266, "李白先生，": 32,
        "张飞，": 357, "张将军，": 8, "张翼德，": 5, "张飞将军，": 2,
        "皇上，": 138, "陛下，": 87, "皇帝陛下，": 41, "陛下殿下，": 4, "皇帝，": 1, " 陛下，": 1,
        "华妃，": 255, "华妃娘娘，": 21, "华妃殿下，": 5,
        "": 10,
    }  # fmt: skip
    assert whole == [(NAMES[0], number) for number in (71, 72, 73, 345, 346, 347, 996, 997, 998, 999)]


@pytest.mark.parametrize("data_dir", [path for path in REAL if TOKENIZER.is_file()], ids=lambda path: path.name)
def test_rolebench_persona_lengths(run, data_dir):
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    for role, character in read_characters(data_dir / "profiles-zh_desc.json").items():
        description = character["description"]
        assert 55 <= len(tokenizer.encode(persona(role, description))) - len(tokenizer.encode(description)) <= 70
    train, _ = run(data_dir=data_dir, roles=FIVE[:3])
    lengths = {system: len(tokenizer.encode(system)) for system in {line["system"] for line in train}}
    assert 92 <= sum(lengths[line["system"]] for line in train) / len(train) <= 100


# ---------------------------------------------------------------- what a user can get wrong

GOOD = '{"role": "李白", "question": "李白，好吗？", "generated": ["好"]}'
PROFILES = "profiles-zh_desc.json"
GENERAL = NAMES[1]
BAD_LINES = [  # (what stands in line 2, what the error says)
    ("{", "is not a JSON object"),
    ("李白，好吗？", "is not a JSON object"),
    (GOOD + GOOD, "Extra data at column"),
    ("[1]", "is not a JSON object"),
    ("null", "is not a JSON object"),
    ("NaN", "is not a JSON object"),
    ("1" * 5000, "is not a JSON object"),
    ("[" * 100_000, "recursion"),
    ('{"role": "李白", "type": ' + '{"a":' * 100_000, "recursion"),
    (GOOD.replace("}", ', "role": "张飞"}'), "the key 'role' occurs twice"),
    (GOOD.replace('"role": "李白", ', ""), '"role" is missing'),
    (GOOD.replace('"question": "李白，好吗？", ', ""), '"question" is missing'),
    (GOOD.replace(', "generated": ["好"]', ""), '"generated" is missing'),
    (GOOD.replace('"李白"', "1"), '"role" is not a string'),
    (GOOD.replace('"李白"', "[]"), '"role" is not a string'),
    (GOOD.replace('"李白，好吗？"', "NaN"), '"question" is missing'),
    (GOOD.replace('"李白，好吗？"', "9" * 5000), '"question" is not a string'),
    (GOOD.replace("李白，好吗？", ""), '"question" is blank'),
    (GOOD.replace("李白，好吗？", r" \n\u3000"), '"question" is blank'),
    (GOOD.replace("李白，好吗？", r"李白\ud800，好吗？"), '"question" holds half of a surrogate pair'),
    (GOOD.replace('["好"]', '"好"'), '"generated" is missing or holds no list'),
    (GOOD.replace('["好"]', "[]"), '"generated" is missing or holds no list'),
    (GOOD.replace('["好"]', '["好", 2]'), 'answer 2 of "generated" is not a string'),
    (GOOD.replace('["好"]', '[["好"]]'), 'answer 1 of "generated" is not a string'),
    (GOOD.replace('["好"]', '["好", ""]'), 'answer 2 of "generated" is blank'),
    (GOOD.replace('["好"]', r'["\udfff"]'), 'answer 1 of "generated" holds half of a surrogate pair'),
    (GOOD.replace('"李白"', '"杜甫"'), "the role '杜甫' has no profile"),
    (GOOD.replace('"李白"', '"李白 "'), "the role '李白 ' has no profile"),
]


@pytest.mark.parametrize("line, problem", BAD_LINES, ids=[problem for _, problem in BAD_LINES])
def test_a_bad_line(run, line, problem):
    path = run.data / GENERAL
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n", encoding="utf-8")
    (error,) = run.errors()
    assert error.startswith(f"{path}:2: ")
    assert problem in error and re.search(r": (add|write|put|correct|fill|remove)", error)  # with the remedy


BAD_FILES = [  # (file, its bytes or None for no file, what follows the file's name, what the error says)
    (GENERAL, (GOOD + "\n").encode("gbk"), ":1: ", "is not UTF-8"),
    (GENERAL, (GOOD + "\n" + GOOD).encode() + b"\xff", ":2: ", "is not UTF-8"),
    (GENERAL, GOOD.encode("utf-16"), ": ", "is UTF-16: save the file as UTF-8"),
    (PROFILES, None, ": ", "No such file"),
    (PROFILES, b"", ": ", "is empty"),
    (PROFILES, '{"李白": "爱酒"}'.encode("gbk"), ":1: ", "is not UTF-8"),
    (PROFILES, '{\n"李白": "爱酒",\n}'.encode(), ":3: ", "is not a JSON object"),
    (PROFILES, '["李白"]'.encode(), ":1: ", "is not a JSON object"),
    (PROFILES, b"{}", ":1: ", "holds no role"),
    (PROFILES, '{\n"李白": "爱酒",\n"张飞": 1}'.encode(), ":3: ", "the profile of '张飞' is not a string"),
    (PROFILES, '{\n"李白": "爱酒",\n\n"张飞" : " "}'.encode(), ":4: ", "the profile of '张飞' is blank"),
    (PROFILES, '{\n"李白": "爱酒",\n"张飞": null}'.encode(), ":3: ", "the profile of '张飞' is missing"),
    (PROFILES, '{"李白": "爱\\ud800酒"}'.encode(), ":1: ", "the profile of '李白' holds half of a surrogate pair"),
    (PROFILES, '{"李白": "爱酒",\n"": "无名"}'.encode(), ":2: ", "the role '' is blank"),
    (PROFILES, '{"李白": "爱酒", "李白": "爱诗"}'.encode(), ":1: ", "the key '李白' occurs twice"),
    (PROFILES, b'{"a":' * 100_000, ":1: ", "recursion"),
]


@pytest.mark.parametrize("name, content, where, problem", BAD_FILES, ids=[f"{f[0]}-{f[3]}" for f in BAD_FILES])
def test_a_bad_file(run, name, content, where, problem):
    path = run.data / name
    path.unlink() if content is None else path.write_bytes(content)
    (error,) = run.errors()
    assert error.startswith(f"{path}{where}") and problem in error


def test_a_directory_in_place_of_a_file(run):
    (run.data / GENERAL).unlink()
    (run.data / GENERAL).mkdir()
    (error,) = run.errors()
    assert error.startswith(f"{run.data / GENERAL}: ")


def test_all_problems_are_told_together(run):
    (run.data / PROFILES).write_text('{\n"李白": "爱酒",\n"张飞": ""\n}', encoding="utf-8")
    (run.data / NAMES[0]).write_text(f'{{\n{GOOD}\n{{"role": 1, "question": ""}}\n', encoding="utf-8")
    (run.data / NAMES[2]).unlink()
    (run.data / NAMES[2]).mkdir()
    (run.data / NAMES[3]).write_bytes(b"\xff")
    starts = [
        "--max_responses 0: ",
        f"--train_path {run.data / PROFILES}: ",
        f"{run.data / PROFILES}:3: ",
        f"{run.data / NAMES[0]}:1: ",
        f'{run.data / NAMES[0]}:3: "generated"',
        f'{run.data / NAMES[0]}:3: "role"',
        f'{run.data / NAMES[0]}:3: "question"',
        f"{run.data / NAMES[2]}: ",
        f"{run.data / NAMES[3]}:1: ",
    ]
    before = (run.data / PROFILES).read_bytes()
    errors = run.errors("--max_responses", "0", "--train_path", str(run.data / PROFILES))
    assert [error.startswith(start) for error, start in zip(errors, starts, strict=True)] == [True] * 9, errors
    assert (run.data / PROFILES).read_bytes() == before


def test_a_flood_is_cut_short(run):
    (run.data / NAMES[0]).write_text("{\n" * 33, encoding="utf-8")
    errors = run.errors()
    assert [error.split(" ")[0] for error in errors[:20]] == [f"{run.data / NAMES[0]}:{n}:" for n in range(1, 21)]
    assert errors[20:] == ["and 13 more"]


def test_a_missing_profile_is_told_once_a_file(run):
    (run.data / GENERAL).write_text((GOOD + "\n" + GOOD.replace('"李白"', '"杜甫"') + "\n") * 50, encoding="utf-8")
    (error,) = run.errors()
    assert error.startswith(f"{run.data / GENERAL}:2: ")


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--roles", "李白", "杜甫"], "--roles 杜甫: has no profile in "),
        (["--roles", "all", "杜甫"], "--roles 杜甫: has no profile in "),
        (["--roles"], "argument --roles: expected at least one argument"),
        (["--max_responses", "0"], "--max_responses 0: "),
        (["--max_responses", "-3"], "--max_responses -3: "),
        (["--max_responses", "two"], "argument --max_responses: invalid int value: 'two'"),
        (["--max_responses", "1" * 5000], "argument --max_responses: invalid int value"),
        (["--seed", "0.5"], "argument --seed: invalid int value: '0.5'"),
        (["--role", "李白"], "unrecognized arguments: --role"),
        (["--roles", "张飞"], "{data}: no samples for training: "),
        (["--train_path", "{out}/../out/test.json"], "--test_path {out}/test.json: "),
        (["--train_path", "{data}"], "--train_path {data}: is no regular file"),
        (["--train_path", ""], "--train_path .: is no regular file"),
        (["--test_path", "{data}/../in/" + GENERAL], "--test_path {data}/../in/" + GENERAL),
        (["--train_path", "{data}/" + PROFILES], "--train_path {data}/" + PROFILES),
        (["--train_path", "{data}/" + PROFILES + "/train.json"], "{data}/" + PROFILES),
        (["--data_dir", "{data}/" + PROFILES + "/in", "--desc_path", "{data}/" + PROFILES], "{data}/" + PROFILES),
    ],
)
def test_a_bad_flag(run, flags, problem):
    def fill(text):
        return text.replace("{data}", str(run.data)).replace("{out}", str(run.out))

    before = {path: path.read_bytes() for path in run.data.iterdir()}
    errors = run.errors(*map(fill, flags))
    assert errors[0].startswith(fill(problem)) and len(errors) in (1, 4)
    assert {path: path.read_bytes() for path in run.data.iterdir()} == before


def test_earlier_outputs_survive_a_failure(run):
    run()
    written = run.train.read_bytes(), run.test.read_bytes()
    (run.data / GENERAL).write_text("{", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["--data_dir", str(run.data), "--train_path", str(run.train), "--test_path", str(run.test)])
    assert (run.train.read_bytes(), run.test.read_bytes()) == written
    assert files_below(run.out) == {"train.json", "test.json"}


def test_what_is_no_problem(run):
    """Windows line ends, blank lines, no last line end, unknown keys with odd values, line separators within text."""
    line = GOOD.replace("好吗", "好\u2028\x85吗").replace("}", ', "type": NaN, "id": ' + "7" * 5000 + "}")
    (run.data / GENERAL).write_bytes(f"\r\n{line}\r\n\r\n{GOOD}".encode())
    train, _ = run()
    assert [line["prompt"] for line in train[1:]] == ["李白，好\u2028\x85吗？", "李白，好吗？"]


# ---------------------------------------------------------------- samples read back


def test_samples_are_read_as_they_were_written(run):
    train, _ = run(data_dir=SAMPLE, roles=["all"])
    assert [as_written(sample) for sample in read_samples(run.train)] == train and len(train) == 204


# ---------------------------------------------------------------- conversations


USER, ASSISTANT = turns("问", "答")
UNTRAINED = {**ASSISTANT, "train": False}
BAD_CONVERSATIONS = [  # (record, what the error says)
    ({"messages": [USER, USER, ASSISTANT]}, "two turns of the user in a row"),
    ({"messages": [USER, ASSISTANT, ASSISTANT]}, "two turns of the assistant in a row"),
    ({"messages": [USER]}, "does not end on the assistant's turn"),
    ({"messages": [USER, ASSISTANT, USER]}, "does not end on the assistant's turn"),
    ({"messages": [SYSTEM]}, "does not end on the assistant's turn"),
    ({"messages": [ASSISTANT, ASSISTANT]}, "two turns of the assistant in a row"),
    ({"messages": [USER, SYSTEM, ASSISTANT]}, "turn 2 is the system's: only the first may be"),
    ({"messages": [USER, {"role": "tool", "content": "答"}]}, "turn 2: \"role\" is 'tool': write user, assistant"),
    ({"messages": [USER, {"content": "答"}]}, "turn 2: \"role\" is 'None'"),
    ({"messages": [USER, {"role": ["user"], "content": "答"}]}, 'turn 2: "role" is'),
    ({"messages": [USER, {**ASSISTANT, "content": " "}]}, 'turn 2: "content" is blank'),
    ({"messages": [USER, {**ASSISTANT, "content": None}]}, 'turn 2: "content" is missing'),
    ({"messages": [USER, {**ASSISTANT, "content": [1]}]}, 'turn 2: "content" is not a string'),
    ({"messages": [USER, {**ASSISTANT, "train": "no"}]}, 'turn 2: "train" is neither true nor false'),
    ({"messages": [USER, UNTRAINED]}, "nothing is to be trained"),
    ({"messages": [USER, "答"]}, "turn 2 is no object"),
    ({"messages": "问"}, '"messages" is no list of turns'),
    ({"messages": [SYSTEM, USER, ASSISTANT], "system": "甲"}, "has a system text twice"),
    ({"messages": [USER, ASSISTANT], "system": 1}, '"system" is not a string'),
    ({"messages": [USER, ASSISTANT], "role": 1}, '"role" is not a string'),
    ({"question": "问", "answer": "答"}, 'holds no sample: write "messages", or "prompt" and "response"'),
    ({"instruction": "问", "output": "答", "history": [["问", "答"]]}, '"history" is not read'),
    ({"conversations": [{"from": "human", "value": "问"}, {"from": "bing", "value": "答"}]}, "write human, gpt or"),
    ({"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "答"}]}, '"value" is blank'),
    ({"messages": [USER, ASSISTANT], "conversations": [USER, ASSISTANT]}, 'both "messages" and "conversations"'),
    ({"prompt": "问", "response": ""}, '"response" is missing'),
    (
        {"instruction": "扮演", "prompt": "问", "response": "答"},
        'has "instruction" beside "prompt": write one of the forms',
    ),
    ({"system": "甲", "instruction": "乙", "input": "问", "output": "答"}, 'both "system" and "instruction"'),
]


@pytest.mark.parametrize("record, problem", BAD_CONVERSATIONS, ids=[problem for _, problem in BAD_CONVERSATIONS])
def test_a_bad_conversation_is_one_line(run, record, problem):
    path = run.data / "mine.jsonl"
    write_lines(path, {"messages": [USER, ASSISTANT]}, record, {"messages": TWO_ROUNDS})
    (error,) = run.errors("--conversations", str(path), roles=["all"])
    assert error.startswith(f"{path}:2: ") and problem in error
    path.write_text(json.dumps([{"messages": [USER, ASSISTANT]}, record]), encoding="utf-8")
    (error,) = run.errors("--conversations", str(path), roles=["all"])
    assert error.startswith(f"{path}: sample 2: ") and problem in error
    with pytest.raises(UserError, match=re.escape(problem)):
        list(read_samples(path))


def test_all_bad_conversations_are_told(run):
    write_lines(run.data / "one.jsonl", {"messages": [USER]}, {"messages": [USER, ASSISTANT]}, {"messages": []})
    (run.data / "two.jsonl").write_text("{\n", encoding="utf-8")
    files = [str(run.data / "one.jsonl"), str(run.data / "two.jsonl")]
    errors = run.errors("--conversations", *files, "--test_share", "1", roles=["all"])
    starts = ["--test_share 1.0: ", f"{files[0]}:1: ", f"{files[0]}:3: ", f"{files[1]}:1: "]
    assert [error.startswith(start) for error, start in zip(errors, starts, strict=True)] == [True] * 4


def test_neighbours_of_one_speaker_are_joined_on_demand(run):
    path = run.data / "mine.jsonl"
    messages = [*turns("甲"), *turns("乙"), UNTRAINED, ASSISTANT, *TWO_ROUNDS]
    write_lines(path, {"messages": messages}, {"messages": TWO_ROUNDS})
    assert "--merge_turns" in run.errors("--conversations", str(path), roles=["all"])[0]
    train, test = run("--conversations", str(path), "--merge_turns", roles=["all"])
    joined = [{"role": "user", "content": "甲\n乙"}, {"role": "assistant", "content": "答\n答", "train": False}]
    assert [*joined, *TWO_ROUNDS] in [sample["messages"] for sample in train + test]
    assert "2 turns joined" in run.capsys.readouterr().out
    assert "--conversations" in run.errors("--merge_turns")[0]


def test_conversations_of_ones_own(run):
    """A role's persona comes from its profile; exact duplicates go; the test part has other questions, always the same."""
    path, other = run.data / "mine.jsonl", run.data / "other.json"
    lines = [{"role": "李白", "messages": turns(f"问{n}", f"答{n}", "再问", f"再答{n}")} for n in range(20)]
    branch = {"role": "李白", "messages": turns("问3", "答3", "再问", "另答")}
    write_lines(path, *lines, branch, lines[3])
    other.write_text(json.dumps([{"system": "自己的", "role": "李白", "messages": TWO_ROUNDS}]), encoding="utf-8")
    flags = ["--conversations", str(path), str(other)]
    train, test = run(*flags, roles=["all"])
    assert len(train) + len(test) == 22 and len(test) == 2
    expected = [
        {"role": "李白", "system": persona("李白", "爱酒"), "messages": line["messages"]} for line in [*lines, branch]
    ]
    expected.append({"role": "李白", "system": "自己的", "messages": TWO_ROUNDS})
    assert [sample for sample in expected if sample in train] == train  # in the order of the files
    assert [sample for sample in expected if sample in test] == test
    assert not {s["messages"][0]["content"] for s in train} & {s["messages"][0]["content"] for s in test}
    out = run.capsys.readouterr().out
    assert "23 conversations read; left out: 0 of other roles, 1 exact duplicates" in out
    assert "2 of 22 samples are set aside" in out
    assert run(*flags, roles=["all"]) == (train, test)
    parts = [run(*flags, "--seed", str(seed), roles=["all"])[1] for seed in range(5)]
    assert any(part != test for part in parts)
    assert len(run(*flags, "--test_share", "0.5", roles=["all"])[1]) == 11


def test_a_test_file_of_conversations_is_the_test_part(run):
    path, other = run.data / "mine.jsonl", run.data / "other.jsonl"
    write_lines(path, {"messages": TWO_ROUNDS}, {"role": "李白", "messages": TWO_ROUNDS})
    write_lines(other, {"messages": TWO_ROUNDS[:2]}, {"messages": TWO_ROUNDS})
    train, test = run("--conversations", str(path), "--test_conversations", str(other), roles=["all"])
    assert [sample["system"] for sample in train] == ["", persona("李白", "爱酒")]
    assert [sample["messages"] for sample in test] == [TWO_ROUNDS[:2]]  # the other one is a training sample
    out = run.capsys.readouterr().out
    assert "set aside" not in out and "1 exact duplicates" in out and "(no role)" in out
    train, _ = run("--conversations", str(path), "--test_conversations", str(path), str(other), roles=["all"])
    assert len(train) == 2


def test_conversations_that_cannot_be_used(run):
    path = run.data / "mine.jsonl"
    write_lines(path, {"role": "杜甫", "messages": TWO_ROUNDS}, {"role": "杜甫", "messages": TWO_ROUNDS})
    (error,) = run.errors("--conversations", str(path), roles=["all"])
    assert error.startswith(f"{path}: '杜甫' has no system text and no profile in ")
    (run.data / PROFILES).unlink()
    (error,) = run.errors("--conversations", str(path), roles=["all"])
    assert error.startswith(f"{path}: '杜甫' has no system text")
    (error,) = run.errors("--conversations", str(path), roles=["李白"])
    assert error.startswith("--roles 李白: no conversation is of that role: choose from 杜甫, all")
    write_lines(path, {"messages": TWO_ROUNDS}, {"messages": TWO_ROUNDS[:2]})
    assert "no role has a second question" in run.errors("--conversations", str(path), roles=["all"])[0]
    assert "is no regular file, an input" in run.errors("--conversations", str(path), "--train_path", str(path))[0]
    errors = run.errors("--conversations", str(path), "--desc_path", str(run.data / "none.json"), roles=["all"])
    assert errors == [
        f"{run.data / 'none.json'}: No such file or directory: correct the path, or fetch RoleBench with data_helper.py --download"
    ]
    errors = run.errors("--conversations", str(path), "--test_conversations", str(path), roles=["all"])
    assert errors == [
        f"{path}: no samples for the test that are not in training, too: add some, or choose other --roles"
    ]
    path.write_bytes(json.dumps({"messages": TWO_ROUNDS}, ensure_ascii=False).encode("gbk"))
    errors = run.errors("--conversations", str(run.data / "none"), str(path), roles=["all"])
    assert errors == [
        f"{run.data / 'none'}: there is no such file: correct the path",
        f"{path}:1: is not UTF-8: save the file in that encoding",
    ]


def test_every_role_keeps_a_sample_in_training(run):
    """Also where the page's greeting opens every conversation: the question is what parts them."""
    path = run.data / "mine.jsonl"
    greeting = {"role": "assistant", "content": "来者何人？"}
    names = ["李白"] * 9 + ["张飞"] * 2 + ["杜甫"]
    samples = [
        {"role": name, "system": "甲", "messages": [greeting, *turns(f"问{n}", "答")]} for n, name in enumerate(names)
    ]
    write_lines(path, *samples)
    for seed in range(8):
        for share, expected in (("0.1", 1), ("0.95", 9)):
            train, test = run("--conversations", str(path), "--seed", str(seed), "--test_share", share, roles=["all"])
            assert len(test) == expected and {sample["role"] for sample in train} == {*names}
    _, test = run("--conversations", str(path), "--test_share", "0.5", roles=["张飞"])
    assert len(test) == 1 and "12 conversations read; left out: 10 of other roles" in run.capsys.readouterr().out


def test_show_needs_a_file(run):
    assert run.errors("--show", "0") == ["--show 0: give a number from 1"]
    (error,) = run.errors("--show", "1", "--train_path", str(run.data / "none.json"))
    assert error.endswith("none.json: is not a file: first run without --show")


# ---------------------------------------------------------------- what other programs write


SHAPES = {
    "pretty-printed": (json.dumps({"messages": TWO_ROUNDS}, indent=1), "has an object over several lines"),
    "two, pretty-printed": (
        2 * (json.dumps({"messages": TWO_ROUNDS}, indent=1) + "\n"),
        "has an object over several lines",
    ),
    "within an object": (
        json.dumps({"version": 1, "data": [{"messages": TWO_ROUNDS}]}),
        "has its records within an object",
    ),
    "within, pretty-printed": (
        json.dumps({"data": [{"messages": TWO_ROUNDS}]}, indent=1),
        "has an object over several",
    ),
    "within an object a line": (
        2 * (json.dumps({"data": [{"messages": TWO_ROUNDS}]}) + "\n"),
        "has its records within",
    ),
    "commas": (2 * (json.dumps({"messages": TWO_ROUNDS}) + ",\n"), "has commas between its objects"),
    "an array a line": (2 * (json.dumps([{"messages": TWO_ROUNDS}]) + "\n"), "has several arrays"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_another_shape_is_told_once(run, shape):
    text, problem = SHAPES[shape]
    (run.data / "mine.json").write_text(text)
    (error,) = run.errors("--conversations", str(run.data / "mine.json"), roles=["all"])
    assert error == f"{run.data}/mine.json: {error.split(': ')[1]}: write one object a line, or one array of objects"
    assert problem in error
    (run.data / GENERAL).write_text(text.replace("messages", "generated"))
    (error,) = run.errors()
    assert error.startswith(f"{run.data / GENERAL}: {problem}")


def test_rolebench_files_may_be_an_array(run):
    expected = run()
    for name in NAMES:
        (run.data / name).write_text(json.dumps(read_lines(run.data / name), indent=1))
    assert run() == expected


BYTES = {
    "portrait.png": (b"\x89PNG\r\n\x1a\n" + bytes(9), "is a PNG image"),
    "train.parquet": (b"PAR1\x15\x04\x15", "is a Parquet file"),
    "train.jsonl.gz": (gzip.compress(b"{}"), "is compressed by gzip: unpack it"),
    "train.xlsx": (b"PK\x03\x04\x14\x00\x06\x00\xff", "is a zip archive, as .xlsx and .docx are"),
    "photo.jpg": (b"\xff\xd8\xff\xe0\x00", "is a JPEG image"),
    "train.json": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "is a Git-LFS pointer"),
    "notepad.txt": (json.dumps({"messages": TWO_ROUNDS}).encode("utf-16"), "is UTF-16: save the file as UTF-8"),
}


@pytest.mark.parametrize("name", BYTES)
def test_a_file_of_another_kind_is_called_by_its_name(run, name):
    content, kind = BYTES[name]
    (run.data / name).write_bytes(content)
    (error,) = run.errors("--conversations", str(run.data / name), roles=["all"])
    assert error.startswith(f"{run.data / name}: {kind}")
    if name != "train.json":
        (error,) = run.errors("--desc_path", str(run.data / name))
        assert error.startswith(f"{run.data / name}: {kind}")
    (run.data / GENERAL).write_bytes(content)
    (error,) = run.errors()
    assert error.startswith(f"{run.data / GENERAL}: {kind}")


def test_a_byte_order_mark_is_no_error_anywhere(run):
    expected = run()
    for path in [run.data / PROFILES, *(run.data / name for name in NAMES)]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert run() == expected
    both = (run.data / NAMES[0]).read_bytes() * 2  # two such files joined: a mark stands within
    (run.data / NAMES[0]).write_bytes(both)
    assert len(run()[0]) == len(expected[0]) + 1
    path = run.data / "mine.json"
    for text in (json.dumps({"messages": TWO_ROUNDS}), json.dumps([{"messages": TWO_ROUNDS}])):
        path.write_text("\ufeff" + text, encoding="utf-8")
        assert [sample["messages"] for sample in read_samples(path)] == [TWO_ROUNDS]


def test_a_clone_of_the_hubs_dataset_is_a_data_directory(run):
    write_lines(run.data / NAMES[0], {"role": "李白", "question": "李白，几岁？", "generated": ["忘了"]})
    expected = run()
    for remote, name in REMOTE.items():
        (run.data / remote).parent.mkdir(parents=True, exist_ok=True)
        (run.data / name).rename(run.data / remote)
    assert run() == expected
    assert example_questions(str(run.data / "profiles-zh/desc.json"), ["李白"]) == {"李白": ["几岁？"]}


# ---------------------------------------------------------------- names and profiles


def test_a_name_in_another_unicode_form_is_the_same_role(run):
    name = "José"
    composed, parted = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    assert composed != parted
    (run.data / PROFILES).write_text(json.dumps({parted: "画家"}), encoding="utf-8")
    write_lines(run.data / NAMES[0], {"role": composed, "question": "谁？", "generated": ["我"]})
    for file in NAMES[1:]:
        write_lines(run.data / file, {"role": parted, "question": f"{file}？", "generated": ["我"]})
    for typed in (composed, parted):
        train, test = run(roles=[typed])
        assert {sample["role"] for sample in train + test} == {composed} and len(train) == 2
    write_lines(run.data / "mine.jsonl", *[{"role": parted, "messages": turns(f"问{n}", "答")} for n in range(3)])
    train, _ = run("--conversations", str(run.data / "mine.jsonl"), roles=[composed])
    assert train[0]["system"] == persona(composed, "画家")
    (run.data / PROFILES).write_text(json.dumps({parted: "画家", composed: "诗人"}), encoding="utf-8")
    assert "occurs twice, in two forms of Unicode" in run.errors(roles=[composed])[0]


def test_a_role_called_all_is_not_taken_for_all_roles(run):
    (run.data / PROFILES).write_text(json.dumps({"李白": "爱酒", "all": "众人"}), encoding="utf-8")
    write_lines(
        run.data / "mine.jsonl", *[{"role": "all", "system": "甲", "messages": turns(f"问{n}", "答")} for n in range(3)]
    )
    run(roles=["李白"])
    assert run.errors(roles=["all"]) == [
        "--roles all: a role has that name: rename it, or name the roles that you want"
    ]
    assert run.errors("--conversations", str(run.data / "mine.jsonl"), roles=["all"])[0].startswith(
        "--roles all: a role"
    )


def test_a_profile_is_the_same_text_everywhere(run):
    """Line ends become those that a browser sends; what the page would refuse is refused here, with its line."""
    profile = {
        "description": "甲\r\n乙\r丙\u000b丁\u2028戊",
        "greeting": "来\r\n了",
        "questions": ["问\r\n？"],
        "names": [],
    }
    (run.data / PROFILES).write_text(json.dumps({"李白": profile}), encoding="utf-8")
    character = read_characters(run.data / PROFILES)["李白"]
    assert character["description"] == "甲\n乙\n丙\n丁\n戊" and character["greeting"] == "来\n了"
    assert character["questions"] == ["问\n？"]
    assert run()[0][0]["system"] == persona("李白", "甲\n乙\n丙\n丁\n戊")
    empty = {"description": "甲", "greeting": "", "questions": [], "portrait": None, "names": None}
    (run.data / PROFILES).write_text(json.dumps({"李白": empty}), encoding="utf-8")
    assert read_characters(run.data / PROFILES)["李白"]["portrait"] == ""
    for role, description, problem in (
        ("李白", "甲" * 8001, "the profile of '李白' has 8,001 characters, at most 8,000 are allowed"),
        ("李" * 101, "甲", "has 101 characters, at most 100 are allowed"),
        ("李白", "甲\u0007", "the profile of '李白' holds the control character U+0007: remove it"),
    ):
        (run.data / PROFILES).write_text(json.dumps({role: description}), encoding="utf-8")
        assert problem in run.errors()[0]


# ---------------------------------------------------------------- one's own character


@pytest.mark.parametrize("others", ["missing", "empty"])
def test_a_character_of_ones_own_works_from_one_file(run, others):
    """Five questions and a profile in RoleBench's form, which is all that one has."""
    for name in NAMES:
        (run.data / name).unlink() if others == "missing" else (run.data / name).write_text(" \n")
    profile = {"诸葛亮": {"description": "卧龙先生", "names": ["孔明", "丞相"]}}
    (run.data / PROFILES).write_text(json.dumps(profile), encoding="utf-8")
    rows = [{"role": "诸葛亮", "question": f"孔明先生，问{n}？", "generated": [f"答{n}"]} for n in range(5)]
    write_lines(run.data / NAMES[0], *rows)
    train, test = run(roles=["诸葛亮"])
    assert (len(train), len(test)) == (4, 1)
    assert {sample["prompt"] for sample in train + test} == {f"问{n}？" for n in range(5)}
    assert train[0]["system"] == persona("诸葛亮", "卧龙先生")
    assert "1 of 5 samples are set aside" in run.capsys.readouterr().out
    assert run(roles=["诸葛亮"]) == (train, test)


def test_two_answers_to_a_question_are_not_parted(run):
    for name in NAMES:
        (run.data / name).unlink()
    rows = [{"role": "李白", "question": f"问{n}？", "generated": ["答", "又答"]} for n in range(8)]
    write_lines(run.data / NAMES[1], *rows)
    for seed in range(5):
        train, test = run("--seed", str(seed), "--test_share", "0.3")
        assert len(test) == 4 and not {s["prompt"] for s in train} & {s["prompt"] for s in test}


def test_no_file_at_all(run):
    for name in NAMES:
        (run.data / name).unlink()
    assert run.errors() == [f"{run.data}: has none of RoleBench's files: write one, or add --download"]


# ---------------------------------------------------------------- downloading

REMOTE = {
    **{f"rolebench-zh/{kind}/{s}.jsonl": f"rolebench-zh_{kind}_{s}.jsonl" for kind in ("role_specific", "general") for s in ("train", "test")},
    "profiles-zh/desc.json": PROFILES,
}  # fmt: skip


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as hf_hub_download asks for: HEAD and GET of a file, with its ETag and commit."""

    protocol_version = "HTTP/1.1"
    prefix = "/datasets/ZenMoore/RoleBench/resolve/main/"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.server.fetched.append(self.path)
        self.answer(with_body=True)

    def answer(self, with_body):
        name = REMOTE.get(self.path.removeprefix(self.prefix)) if self.path.startswith(self.prefix) else None
        if name is None or (self.server.fault == "one missing" and name == NAMES[3]):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = (SAMPLE / name).read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body and self.server.fault == "cut short" and name == NAMES[1]:
            self.wfile.write(content[:100])
            self.close_connection = True
        elif with_body:
            self.wfile.write(content)


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.fault, server.fetched = None, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def download(hub, directory, offline="0"):
    """Run the script as a user does: the hub's client reads HF_ENDPOINT when it is imported."""
    flags = [
        "--data_dir",
        directory / "in",
        "--train_path",
        directory / "train.json",
        "--test_path",
        directory / "test.json",
    ]
    env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(directory / "hf"),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, ROOT / "data_helper.py", "--download", *flags]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_download_then_samples(hub, tmp_path):
    (tmp_path / "in").mkdir()
    kept = '{"孙悟空": "改过的", "李白": "改过的", "张飞": "改过的", "皇帝": "改过的", "华妃": "改过的"}'
    (tmp_path / "in" / PROFILES).write_text(kept, encoding="utf-8")
    result = download(hub, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert {path.name for path in (tmp_path / "in").iterdir()} == {*NAMES, PROFILES}  # and no leftovers
    assert all((tmp_path / "in" / name).read_bytes() == (SAMPLE / name).read_bytes() for name in NAMES)
    assert (tmp_path / "in" / PROFILES).read_text(encoding="utf-8") == kept  # the user's own file stays,
    assert f"{PROFILES} is there already" in result.stdout  # which is said
    assert len(read_lines(tmp_path / "train.json")) == 138
    wanted = {Hub.prefix + remote for remote, name in REMOTE.items() if name != PROFILES}
    assert {path for path in hub.fetched if path.startswith("/datasets/")} == wanted


@pytest.mark.parametrize(
    "fault, file", [("one missing", "general/test"), ("cut short", "general/train"), ("offline", "role_specific/train")]
)
def test_a_failed_download_leaves_nothing(hub, tmp_path, fault, file):
    hub.fault = fault
    result = download(hub, tmp_path, offline="1" if fault == "offline" else "0")
    assert result.returncode == 2
    (error,) = result.stderr.splitlines()
    assert re.match(rf"error: {re.escape(str(tmp_path / 'in'))}/\S+: cannot fetch rolebench-zh/{file}.jsonl of ", error)
    assert "HF_ENDPOINT" in error and "by hand" in error
    assert not files_below(tmp_path / "in") and not (tmp_path / "train.json").exists()
    assert (fault == "offline") == (not hub.fetched)


def test_no_network_without_download(run, monkeypatch):
    def refuse(*_):
        raise AssertionError("data_helper.py looked for a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(run(data_dir=SAMPLE, roles=["all"])[0]) == 204


# ---------------------------------------------------------------- the sample


def sample_rows(split):
    return [row for name in NAMES if split in name for row in read_lines(SAMPLE / name)]


def test_sample_sizes():
    assert set(read_characters(SAMPLE / PROFILES)) == set(FIVE)
    assert Counter(row["role"] for row in sample_rows("train")) == dict(zip(FIVE, [45, 45, 45, 33, 31]))
    assert Counter(row["role"] for row in sample_rows("test")) == dict(zip(FIVE, [10, 10, 10, 8, 8]))
    assert {type(row.get("type")) for row in read_lines(SAMPLE / NAMES[0])} == {str}
    assert {type(row.get("type")) for row in read_lines(SAMPLE / NAMES[2])} == {list}
    assert not any("type" in row for name in (NAMES[1], NAMES[3]) for row in read_lines(SAMPLE / name))
    assert all(path.stat().st_size < 100_000 for path in SAMPLE.iterdir())


def test_sample_questions_and_answers():
    train = sample_rows("train")
    answers = [answer for row in train for answer in row["generated"]]
    assert len(set(answers)) == len(answers) == 205
    assert all(15 <= len(answer) <= 45 for answer in answers)
    assert sum(len(row["generated"]) > 1 for row in train) == 5
    assert len({(row["role"], row["question"]) for row in train}) == len(train)
    for row in read_lines(SAMPLE / NAMES[0]) + read_lines(SAMPLE / NAMES[2]):  # every one opens with an address
        assert without_address(row["question"], names_of(row["role"])) != row["question"]


def test_sample_test_questions_rephrase_training_questions():
    """The training question with most characters in common holds the answer, and is worded differently."""

    def alike(one, other):
        one, other = Counter(one), Counter(other)
        return (one & other).total() / (one | other).total()

    train = sample_rows("train")
    for row in sample_rows("test"):
        own = [candidate for candidate in train if candidate["role"] == row["role"]]
        nearest = max(own, key=lambda candidate: alike(candidate["question"], row["question"]))
        assert nearest["generated"] == row["generated"] and len(row["generated"]) == 1
        assert nearest["question"] != row["question"]


def test_sample_conversations_need_their_history(run):
    """Later questions name nobody: the same words have several recorded answers. The test set rephrases, and asks the same."""
    names = {split: SAMPLE / f"conversations_{split}.jsonl" for split in ("train", "test")}
    desc = ["--desc_path", str(SAMPLE / PROFILES)]
    flags = ["--conversations", str(names["train"]), "--test_conversations", str(names["test"])]
    train, test = run(*flags, *desc, roles=["all"])
    assert {sample["role"] for sample in train} == {sample["role"] for sample in test} == set(FIVE)
    assert 28 <= len(train) <= 35 and 10 <= len(test) <= 12
    assert {len(sample["messages"]) // 2 for sample in train} == {2, 3, 4}
    answers = {}
    for sample in train:
        for messages, answer in list(rounds(sample))[1:]:
            answers.setdefault(messages[-1]["content"], set()).add(answer)
    assert sum(len(found) > 1 for found in answers.values()) >= 10
    assert len(answers["那它是从哪儿得来的？"]) == 5

    spoken = {tuple(m["content"] for m in s["messages"] if m["role"] == "assistant"): s for s in train}
    for sample in test:
        twin = spoken[tuple(m["content"] for m in sample["messages"] if m["role"] == "assistant")]
        assert all(m["content"] != t["content"] for m, t in zip(sample["messages"][::2], twin["messages"][::2]))
