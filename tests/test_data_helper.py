"""data_helper.py: addresses, draws, what a user can get wrong, conversations, downloading, and the sample it is tried with."""

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
from collections import Counter

import pytest
from conftest import ROOT, SHARED, TWO_ROUNDS, as_written, turns, write_lines

from data_helper import HUB_FILES, PERSONA, example_questions, main, persona, without_address
from support.dialogues.profiles import read_characters
from support.dialogues.samples import read_samples

SAMPLE = ROOT / "data/sample"
ROLEBENCH = SHARED / "rolebench"  # the real files, where they are at hand
REAL = [ROLEBENCH] if ROLEBENCH.is_dir() else []
FIVE = ["孙悟空", "李白", "张飞", "皇帝", "华妃"]
NAMES = [f"rolebench-zh_{kind}_{split}.jsonl" for split in ("train", "test") for kind in ("role_specific", "general")]
GENERAL, PROFILES = NAMES[1], "profiles-zh_desc.json"
KNOWN = read_characters(SAMPLE / PROFILES)


def read_lines(path):
    text = path.read_bytes().decode("utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]  # splitlines() would also cut at U+2028


def files_below(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def names_of(role):
    """As the sample's profiles have them."""
    return [role, *KNOWN.get(role, {}).get("names", [])]


class Run:
    """A data directory with one good line in every file, and data_helper.py run over it."""

    def __init__(self, directory, capsys):
        self.data, self.out, self.capsys = directory / "in", directory / "out", capsys
        self.train, self.test, self.mine = self.out / "train.json", self.out / "test.json", self.data / "mine.jsonl"
        self.data.mkdir()
        self.write_profiles({"李白": "爱酒", "张飞": "好斗"})
        for name in NAMES:
            write_lines(self.data / name, {"role": "李白", "question": f"李白，{name}吗？", "generated": [f"答{name}"]})

    def write_profiles(self, profiles):
        (self.data / PROFILES).write_text(json.dumps(profiles), encoding="utf-8")

    def remove_rolebench(self):
        for name in NAMES:
            (self.data / name).unlink()

    def __call__(self, *flags, data_dir=None, roles=("李白",)):
        self.train.unlink(missing_ok=True)
        self.test.unlink(missing_ok=True)
        paths = ["--train_path", self.train, "--test_path", self.test]
        main(list(map(str, ["--data_dir", data_dir or self.data, *paths, "--roles", *roles, *flags])))
        return read_lines(self.train), read_lines(self.test)

    def of_conversations(self, *flags, roles=("all",)):
        return self("--conversations", self.mine, *flags, roles=roles)

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
    run.write_profiles({"李白": "爱{酒}与{0}、{role}、100%"})
    write_lines(
        run.data / NAMES[0],
        {"role": "李白", "question": "李白先生，醉了，怎么办？ ", "generated": ["再饮，"], "type": "script_agnostic"},
    )
    write_lines(run.data / GENERAL, {"role": "李白", "question": "李白，是谁？\n", "generated": [" 是我", "我"]})
    train, test = run()
    system = PERSONA.replace("{role}", "李白").replace("{description}", "爱{酒}与{0}、{role}、100%")
    assert train == [
        {"role": "李白", "system": system, "prompt": "醉了，怎么办？ ", "response": "再饮，"},
        {"role": "李白", "system": system, "prompt": "李白，是谁？\n", "response": " 是我"},
        {"role": "李白", "system": system, "prompt": "李白，是谁？\n", "response": "我"},
    ]
    assert [list(line) for line in train] == [["role", "system", "prompt", "response"]] * 3
    assert [line["prompt"] for line in test] == [f"{NAMES[2]}吗？", f"李白，{NAMES[3]}吗？"]
    assert [line["kind"] for line in test] == ["role-specific", "general"]
    assert "李白" in run.train.read_text(encoding="utf-8")  # not \u674e\u767d
    assert re.search(r"3\s+2\s+李白\n\s+3\s+2 .*train\.json.*test\.json", run.capsys.readouterr().out)
    assert "语言模型" in PERSONA and "啰嗦" in PERSONA and "生硬" in PERSONA


CUT = [
    ("孙悟空", "孙悟空，你从哪里来，到哪里去？", "你从哪里来，到哪里去？"),
    ("孙悟空", "齐天大圣孙悟空，打得过他吗？", "打得过他吗？"),
    ("孙悟空", "孙悟空,你饿了吗？", "你饿了吗？"),
    ("孙悟空", "大圣！你饿了吗？", "你饿了吗？"),
    ("孙悟空", "孙悟空，孙悟空是谁起的名字？", "孙悟空是谁起的名字？"),
    ("李白", "李白先生， 您写诗吗？\n", "您写诗吗？\n"),
    ("李白", "亲爱的李白，您写诗吗？", "您写诗吗？"),
    ("张飞", "张飞将军，累不累？", "累不累？"),
    ("皇帝", " 陛下，请问您安好吗？ ", "请问您安好吗？ "),
    ("皇帝", "皇上，华妃，她在哪里？", "华妃，她在哪里？"),
    ("诸葛亮", "诸葛亮先生，冷吗？", "冷吗？"),  # a role that the sample does not have
    ("A.I. (v1)", "A.I. (v1), ready?", "ready?"),
]
WHOLE = [
    ("李白", "在剧中，你为什么不见他？"),
    ("张飞", "张飞将要出征，你去不去？"),
    ("张飞", "张飞、关羽谁更勇，你说说？"),
    ("华妃", "皇上，是你最爱的人吗？"),  # another role's name
    ("孙悟空", "孙悟空！！！"),
    ("A.I. (v1)", "AxIx (v1), ready?"),
    ("张飞", "张飞" + "将军" * 50_000),  # takes no time either
]


def test_an_address_and_nothing_else_is_cut():
    for role, question, prompt in CUT + [(role, whole, whole) for role, whole in WHOLE]:
        assert without_address(question, names_of(role)) == prompt


# ---------------------------------------------------------------- roles, draws, order


def test_default_roles_and_all(run):
    train, test = run(data_dir=SAMPLE, roles=FIVE[:3])
    assert {line["role"] for line in train} == {line["role"] for line in test} == set(FIVE[:3])
    main(["--data_dir", str(SAMPLE), "--train_path", str(run.train), "--test_path", str(run.test)])  # without --roles
    assert (read_lines(run.train), read_lines(run.test)) == (train, test)
    every, _ = run(data_dir=SAMPLE, roles=["all"])
    assert {line["role"] for line in every} == set(FIVE)
    assert run(data_dir=SAMPLE, roles=["李白", "李白"])[0] == [line for line in every if line["role"] == "李白"]


@pytest.mark.parametrize("data_dir", [SAMPLE, *REAL], ids=lambda path: path.name)
def test_order_is_that_of_the_files(run, data_dir):
    train, _ = run("--max_responses", 1, data_dir=data_dir, roles=["all"])
    rows = [row for name in NAMES[:2] for row in read_lines(data_dir / name)]
    assert [line["role"] for line in train] == [row["role"] for row in rows]
    assert all(line["response"] in row["generated"] for line, row in zip(train, rows))
    assert all(row["question"].endswith(line["prompt"]) for line, row in zip(train, rows))


def test_draws_follow_the_seed_and_nothing_else(run):
    rows = [{"role": role, "question": f"问{n}", "generated": list("甲乙丙丁戊")} for role in FIVE for n in range(40)]
    run.write_profiles({role: "有名的人" for role in FIVE})
    write_lines(run.data / GENERAL, *rows)

    def drawn(*flags, roles):
        return [(line["role"], line["prompt"], line["response"]) for line in run(*flags, roles=roles)[0]][1:]

    everyone = drawn(roles=["all"])
    assert drawn("--seed", 1235, roles=["all"]) != everyone
    assert [line for line in everyone if line[0] == "李白"] == drawn(roles=["李白"])[-80:]

    assert len(set(everyone)) == len(everyone) == 400  # two different answers a question
    counts = Counter(answer for _, _, answer in everyone)
    assert len(counts) == 5 and all(50 < count < 110 for count in counts.values()), counts  # 80 on average
    assert len(drawn("--max_responses", 1, roles=["all"])) == 200
    assert drawn("--max_responses", 9, roles=["all"])[:5] == [("孙悟空", "问0", answer) for answer in "甲乙丙丁戊"]


def test_python_hash_seed_does_not_matter(tmp_path):
    """Two processes, as a user runs them, write the same bytes; the outputs do not follow --data_dir."""
    for hash_seed in ("1", "2"):
        (tmp_path / hash_seed).mkdir()
        command = [sys.executable, ROOT / "data_helper.py", "--data_dir", SAMPLE, "--max_responses", "1"]
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        result = subprocess.run(command, env=env, cwd=tmp_path / hash_seed, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert files_below(tmp_path / hash_seed) == {"data/train.json", "data/test.json"}
    assert (tmp_path / "1/data/train.json").read_bytes() == (tmp_path / "2/data/train.json").read_bytes() != b""


# ---------------------------------------------------------------- the real files


@pytest.mark.parametrize("data_dir", REAL, ids=lambda path: path.name)
def test_rolebench_counts(run, data_dir):
    train, test = run(data_dir=data_dir, roles=FIVE[:3])
    assert len(train) == 8020
    assert Counter(line["role"] for line in train[:1003]) == {"孙悟空": 350, "李白": 290, "张飞": 363}
    questions = {row["question"] for row in read_lines(data_dir / GENERAL)}
    assert all(line["prompt"] in questions for line in train[1003:])  # general ones are never touched
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


# ---------------------------------------------------------------- what a user can get wrong

GOOD = '{"role": "李白", "question": "李白，好吗？", "generated": ["好"]}'
NO_QUESTION = 'is no question with its answers: write {"role"'
BAD_LINES = [  # (what stands in line 2, what the error says)
    ("{", "is not a JSON object"),
    (GOOD + GOOD, "is not a JSON object in UTF-8 (Extra data at column"),
    ("[1]", "is not a JSON object"),
    ("[" * 100_000, "is not a JSON object in UTF-8 (nested too deeply)"),
    (GOOD.replace('"role": "李白", ', ""), NO_QUESTION),
    (GOOD.replace('"李白"', "1"), NO_QUESTION),
    (GOOD.replace("李白，好吗？", r"李白\ud800，好吗？"), NO_QUESTION),
    (GOOD.replace('["好"]', '"好"'), NO_QUESTION),
    (GOOD.replace('["好"]', '["好", ""]'), NO_QUESTION),
]


def test_a_bad_line_is_named(run):
    path = run.data / GENERAL
    for line, problem in BAD_LINES:
        path.write_text(f"{GOOD}\n{line}\n{GOOD}\n", encoding="utf-8")
        (error,) = run.errors()
        assert error.startswith(f"{path}:2: {problem}"), line[:50]
    path.write_text((GOOD + "\n" + GOOD.replace('"李白"', '"杜甫"') + "\n") * 50, encoding="utf-8")
    (error,) = run.errors(roles=["all"])  # told once
    assert error.startswith(f"{path}: '杜甫' has no profile in {run.data / PROFILES}")
    path.write_text(GOOD + "\n{" * 33, encoding="utf-8")
    assert [error.split(" ")[0] for error in run.errors()] == [*(f"{path}:{n}:" for n in range(2, 12)), "and"]
    path.write_bytes(f"{GOOD}\n".encode() + f"{GOOD}\n".encode("gbk"))
    (error,) = run.errors()
    assert error.startswith(f"{path}:2: is not a JSON object in UTF-8 ('utf-8' codec")


def test_a_bad_file_is_named(run):
    path = run.data / PROFILES
    for content, problem in [
        (None, ": is no file: correct the path, or fetch RoleBench with data_helper.py --download"),
        (b"", ": is empty"),
        ('{\n"李白": "爱酒"}'.encode("gbk"), ":2: is not UTF-8"),
        ('{\n"李白": "爱酒"\n"张飞": "好斗"}'.encode(), ":3: is not a JSON object"),
        ('["李白"]'.encode(), ": holds no role"),
    ]:
        path.unlink() if content is None else path.write_bytes(content)
        assert run.errors()[0].startswith(f"{path}{problem}"), content
    (run.data / GENERAL).unlink()
    (run.data / GENERAL).mkdir()
    assert any(error.startswith(f"{run.data / GENERAL}: is no file") for error in run.errors())


def test_a_file_of_another_kind_is_called_by_its_name(run):
    path = run.data / "mine"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):  # the latter two without a mark
        path.write_bytes(json.dumps({"messages": TWO_ROUNDS}).encode(encoding))
        for flags in (["--conversations", path], ["--desc_path", path, "--data_dir", SAMPLE]):
            assert run.errors(*flags, roles=["all"])[0].startswith(f"{path}: is UTF-16: save the file as UTF-8")
    (run.data / GENERAL).write_bytes(gzip.compress(b"{}"))
    assert run.errors() == [f"{run.data / GENERAL}: is compressed by gzip: unpack it"]


def test_another_layout_is_told_once(run):
    record = {"messages": TWO_ROUNDS}
    for text in (2 * json.dumps(record, indent=1), 2 * (json.dumps(record) + ",\n"), 2 * (json.dumps([record]) + "\n")):
        run.mine.write_text(text)
        (error,) = run.errors("--conversations", run.mine, roles=["all"])
        assert error.startswith(f"{run.mine}:") and "several objects are one a line, or one array" in error


def test_all_problems_are_told_together(run):
    (run.data / PROFILES).write_text('{\n"李白": "爱酒",\n"张飞": ""\n}', encoding="utf-8")
    (run.data / NAMES[0]).write_text(f'{GOOD}\n{{\n{GOOD}\n{{"role": 1, "question": ""}}\n', encoding="utf-8")
    (run.data / NAMES[3]).write_bytes(b"\xff")
    starts = [f"{run.data / PROFILES}: is an input", f"{run.data / PROFILES}: the description of '张飞' cannot be"]
    starts += [f"{run.data / NAMES[0]}:2: ", f"{run.data / NAMES[0]}:4: ", f"{run.data / NAMES[3]}:1: "]
    before = (run.data / PROFILES).read_bytes()
    errors = run.errors("--train_path", run.data / PROFILES)
    for start in starts:
        assert sum(error.startswith(start) for error in errors) == 1, (start, errors)
    assert (run.data / PROFILES).read_bytes() == before


def test_a_bad_flag(run):
    before = {path: path.read_bytes() for path in run.data.iterdir()}
    for flags, problem in [
        (["--roles", "李白", "杜甫"], "--roles 杜甫: is none of the roles: choose from 李白, 张飞, all"),
        (["--max_responses", "0"], "argument --max_responses: "),
        (["--test_share", "1"], "argument --test_share: "),
        (["--show", "0"], "argument --show: "),
        (["--roles", "张飞"], "no samples for the train file"),
        (["--train_path", f"{run.out}/../out/test.json"], f"{run.test}: is an input or the other output"),
        (["--train_path", f"{run.data}"], f"{run.data}: is no regular file"),
        (["--test_path", f"{run.data}/../in/{GENERAL}"], f"{run.data}/../in/{GENERAL}: is an input"),
    ]:
        assert run.errors(*flags)[0].startswith(problem), flags
    assert {path: path.read_bytes() for path in run.data.iterdir()} == before
    run.remove_rolebench()
    assert run.errors() == [f"{run.data}: has none of RoleBench's files: write one, or add --download"]


def test_what_is_no_problem(run):
    """Windows line ends, blank lines, no last line end, unknown keys with odd values; within text, line ends become plain."""
    line = GOOD.replace("好吗", "好\u2028\x85吗").replace("}", ', "type": NaN, "id": 7}')
    (run.data / GENERAL).write_bytes(f"\r\n{line}\r\n\r\n{GOOD}".encode())
    train, _ = run()
    assert [line["prompt"] for line in train[1:]] == ["李白，好\n\n吗？", "李白，好吗？"]


def test_arrays_byte_order_marks_and_a_clone_of_the_hubs_dataset_are_read_alike(run):
    questions = ["李白，几岁？", f"李白，{'长' * 29}？", f"李白，{'长' * 30}？"]  # the last is no example
    write_lines(run.data / NAMES[0], *({"role": "李白", "question": q, "generated": ["忘了"]} for q in questions))
    expected = run()
    for path in [run.data / PROFILES, *(run.data / name for name in NAMES)]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert run() == expected
    for name in NAMES:
        rows = [json.loads(line) for line in (run.data / name).read_text(encoding="utf-8-sig").splitlines()]
        (run.data / name).write_text("\ufeff\n" + json.dumps(rows, indent=1), encoding="utf-8")
    assert run() == expected
    known = {"李白": read_characters(run.data / PROFILES)["李白"]}
    assert example_questions(run.data / PROFILES, known) == {"李白": ["几岁？", "长" * 29 + "？"]}
    for name, remote in HUB_FILES.items():
        (run.data / remote).parent.mkdir(parents=True, exist_ok=True)
        (run.data / name).rename(run.data / remote)
    assert run() == expected
    assert example_questions(run.data / PROFILES, known) == {"李白": []}


# ---------------------------------------------------------------- conversations


def test_neighbours_of_one_speaker_are_joined_on_demand(run):
    silent = {**turns("问", "答")[1], "train": False}
    messages = [*turns("甲"), *turns("乙"), silent, turns("问", "答")[1], *TWO_ROUNDS]
    write_lines(run.mine, {"messages": messages}, {"messages": TWO_ROUNDS})
    assert "--merge_turns" in run.errors("--conversations", run.mine, roles=["all"])[0]
    train, test = run.of_conversations("--merge_turns")
    joined = [{"role": "user", "content": "甲\n乙"}, {"role": "assistant", "content": "答\n答", "train": False}]
    assert [*joined, *TWO_ROUNDS] in [sample["messages"] for sample in train + test]


def test_conversations_of_ones_own(run):
    """A role's persona comes from its profile; exact duplicates go; the test part has other questions, always the same."""
    other = run.data / "other.json"
    lines = [{"role": "李白", "messages": turns(f"问{n}", f"答{n}", "再问", f"再答{n}")} for n in range(20)]
    branch = {"role": "李白", "messages": turns("问3", "答3", "再问", "另答")}
    bad = [{**lines[4], "kto_tag": False}, {"messages": [TWO_ROUNDS[0], {**TWO_ROUNDS[1], "weight": "0"}]}]
    write_lines(run.mine, *lines[:4], *bad, *lines[4:], branch, lines[3])
    other.write_text(json.dumps([{"system": "自己的", "role": "李白", "messages": TWO_ROUNDS, "kind": "x"}]))
    flags = ["--conversations", run.mine, other]
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
    assert "samples left out: 2 not to be learned, 1 exact duplicates\n" in out and "2 of 22 samples set aside" in out
    assert run(*flags, roles=["all"]) == (train, test)
    parts = [run(*flags, "--seed", seed, roles=["all"])[1] for seed in range(5)]
    assert any(part != test for part in parts)
    for share, count in ((0.5, 11), (0.125, 3)):  # of 22
        assert len(run(*flags, "--test_share", share, roles=["all"])[1]) == count


def test_a_test_file_of_conversations_is_the_test_part(run):
    other = run.data / "other.jsonl"
    write_lines(run.mine, {"messages": TWO_ROUNDS}, {"role": "李白", "messages": TWO_ROUNDS})
    write_lines(other, {"messages": TWO_ROUNDS[:2], "kind": "x"}, {"messages": TWO_ROUNDS})
    train, test = run.of_conversations("--test_conversations", other)
    assert [sample["system"] for sample in train] == ["", persona("李白", "爱酒")]
    assert test == [{"role": "", "system": "", "messages": TWO_ROUNDS[:2]}]  # the other one is a training sample
    out = run.capsys.readouterr().out
    assert "set aside" not in out and "1 exact duplicates" in out and "(no role)" in out
    write_lines(run.mine, *({"messages": turns(f"问{n}", "答")} for n in range(3)))
    (error,) = run.errors("--conversations", run.mine, "--test_conversations", run.mine, roles=["all"])
    assert error.startswith("no samples for the test file, each counted once")


def test_conversations_that_cannot_be_used(run):
    flags = ["--conversations", run.mine]
    write_lines(run.mine, {"role": "杜甫", "messages": TWO_ROUNDS}, {"role": "杜甫", "messages": TWO_ROUNDS})
    (error,) = run.errors(*flags, roles=["all"])
    assert error.startswith(f"{run.mine}: '杜甫' has no profile in ")
    (run.data / PROFILES).unlink()
    (error,) = run.errors(*flags, roles=["李白"])
    assert error.startswith("--roles 李白: is none of the roles: choose from 杜甫, all")
    write_lines(run.mine, {"messages": TWO_ROUNDS}, {"messages": TWO_ROUNDS[:2]})
    reason = "no samples for the test file: of the 1 questions that open the 2 samples, training needs each"
    assert run.errors(*flags, roles=["all"])[0].startswith(reason)
    assert "is an input" in run.errors(*flags, "--train_path", run.mine, roles=["all"])[0]


def test_every_role_keeps_a_sample_in_training(run):
    """Also where the page's greeting opens every conversation: the question is what parts them."""
    greeting = {"role": "assistant", "content": "来者何人？"}
    names = ["李白"] * 9 + ["张飞"] * 2 + ["杜甫"]
    samples = [
        {"role": name, "system": "甲", "messages": [greeting, *turns(f"问{n}", "答")]} for n, name in enumerate(names)
    ]
    write_lines(run.mine, *samples)
    for seed in range(8):
        for share, expected in ((0.1, 1), (0.95, 9)):
            train, test = run.of_conversations("--seed", seed, "--test_share", share)
            assert len(test) == expected and {sample["role"] for sample in train} == {*names}
    _, test = run.of_conversations("--test_share", 0.5, roles=["张飞"])
    assert len(test) == 1 and "samples left out: 10 of other roles\n" in run.capsys.readouterr().out


# ---------------------------------------------------------------- one's own character


@pytest.mark.parametrize("others", ["missing", "empty"])
def test_a_character_of_ones_own_works_from_one_file(run, others):
    """Five questions and a profile in RoleBench's form, which is all that one has."""
    run.remove_rolebench()
    for name in NAMES if others == "empty" else []:
        (run.data / name).write_text(" \n")
    run.write_profiles({"诸葛亮": {"description": "卧龙先生", "names": ["孔明", "丞相"]}})
    rows = [{"role": "诸葛亮", "question": f"孔明先生，问{n}？", "generated": [f"答{n}"]} for n in range(5)]
    write_lines(run.data / NAMES[0], *rows)
    train, test = run(roles=["诸葛亮"])
    assert (len(train), len(test)) == (4, 1)
    assert {sample["prompt"] for sample in train + test} == {f"问{n}？" for n in range(5)}
    assert train[0]["system"] == persona("诸葛亮", "卧龙先生")
    assert "1 of 5 samples set aside" in run.capsys.readouterr().out
    for row in rows:
        row["generated"].append("又答")
    write_lines(run.data / NAMES[0], *rows)
    for seed in range(5):  # two answers to a question are not parted
        train, test = run("--seed", seed, "--test_share", 0.4, roles=["诸葛亮"])
        assert len(test) == 4 and not {s["prompt"] for s in train} & {s["prompt"] for s in test}


def test_a_name_in_another_unicode_form_is_the_same_role(run):
    composed, parted = "Jos\u00e9", "Jose\u0301"
    run.write_profiles({parted: "画家"})
    write_lines(run.data / NAMES[0], {"role": composed, "question": "谁？", "generated": ["我"]})
    for file in NAMES[1:]:
        write_lines(run.data / file, {"role": parted, "question": f"{file}？", "generated": ["我"]})
    for typed in (composed, parted):
        train, test = run(roles=[typed])
        assert {sample["role"] for sample in train + test} == {composed} and len(train) == 2
    write_lines(run.mine, *[{"role": parted, "messages": turns(f"问{n}", "答")} for n in range(3)])
    assert run.of_conversations(roles=[composed])[0][0]["system"] == persona(composed, "画家")


# ---------------------------------------------------------------- downloading


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
        name = {self.prefix + remote: name for name, remote in HUB_FILES.items()}.get(self.path)
        content = (SAMPLE / name).read_bytes() if name else b""
        self.send_response(200 if name else 404)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body and name == self.server.cut_short:
            content, self.close_connection = content[:100], True
        if with_body:
            self.wfile.write(content)


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.cut_short, server.fetched = None, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def download(hub, directory):
    """Run the script as a user does: the hub's client reads HF_ENDPOINT when it is imported."""
    flags = ["--data_dir", directory / "in", "--train_path", directory / "train.json"]
    flags += ["--test_path", directory / "test.json"]
    env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(directory / "hf")}
    env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, ROOT / "data_helper.py", "--download", *flags]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_download_then_samples(hub, tmp_path):
    (tmp_path / "in").mkdir()
    kept = json.dumps({role: "改过的" for role in FIVE})
    (tmp_path / "in" / PROFILES).write_text(kept, encoding="utf-8")
    result = download(hub, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert {path.name for path in (tmp_path / "in").iterdir()} == {*NAMES, PROFILES}  # and no leftovers
    assert all((tmp_path / "in" / name).read_bytes() == (SAMPLE / name).read_bytes() for name in NAMES)
    assert (tmp_path / "in" / PROFILES).read_text(encoding="utf-8") == kept  # the user's own file stays,
    assert f"{PROFILES} is there already" in result.stdout  # which is said
    assert len(read_lines(tmp_path / "train.json")) == 138
    wanted = {Hub.prefix + remote for name, remote in HUB_FILES.items() if name != PROFILES}
    assert {path for path in hub.fetched if path.startswith("/datasets/")} == wanted


def test_a_failed_download_leaves_no_part_of_a_file(hub, tmp_path):
    hub.cut_short = GENERAL
    result = download(hub, tmp_path)
    assert result.returncode == 2
    (error,) = result.stderr.splitlines()
    assert error.startswith(f"error: {tmp_path / 'in' / GENERAL}: cannot fetch rolebench-zh/general/train.jsonl of ")
    assert "HF_ENDPOINT" in error and "by hand" in error
    assert files_below(tmp_path / "in") == {NAMES[0]} and not (tmp_path / "train.json").exists()


def test_no_network_without_download(run, monkeypatch):
    def refuse(*_):
        raise AssertionError("data_helper.py looked for a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    train, _ = run(data_dir=SAMPLE, roles=["all"])
    assert [as_written(sample) for sample in read_samples(run.train)] == train and len(train) == 204
