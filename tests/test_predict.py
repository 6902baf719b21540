"""predict.py: interrupted runs lose nothing, answers of other settings are not mixed, and one table shows the scores."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, answers_of, make_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file

import data_helper
import predict
from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from support.dialogues.samples import first_question, read_samples
from support.errors import UserError
from support.model.directory import ModelDirectory
from support.scores.likelihood import Likelihood
from support.scores.persona import persona_scores, read_personas
from support.scores.table import MEASURES, compare, texts

# ---------------------------------------------------------------- the script


def run(checkpoint, samples, output, *more):
    flags = ["--model_path", checkpoint, "--test_path", samples[1], "--output_path", output, "--max_new_tokens", 4]
    flags += ["--lang", "en", "--resamples", 20, "--train_path", "none.json", "--answers_only"]
    predict.main([str(flag) for flag in (*flags, *more)])


def test_whole_script_with_a_baseline(checkpoint, samples, tmp_path, capsys):
    adapter = make_adapter(checkpoint, tmp_path / "adapter")
    by_peft = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), adapter).merge_and_unload()
    tuned = tmp_path / "tuned"
    by_peft.save_pretrained(tuned)
    BaichuanTokenizer.from_pretrained(checkpoint).save_pretrained(tuned)
    more = ["--baseline_path", checkpoint, "--train_path", samples[0], "--by", "kind"]
    run(tuned, samples, tmp_path / "answers.jsonl", *more)
    out = capsys.readouterr().out

    records = list(read_samples(samples[1]))
    questions = {(record["system"], first_question(record["messages"])): record["role"] for record in records}
    assert len(answers_of(tmp_path / "answers.jsonl")) == len(questions)
    assert len(answers_of(tmp_path / "answers-baseline.jsonl")) == len(questions)
    whole, *blocks = re.split(r"\n(role-specific|general) questions \((\d+)\)\n", out)
    assert f"Questions: {len(questions)}, roles: 5." in whole and "are in the training samples" not in whole
    header, _, *rows = [line for line in whole.split("\n") if line.startswith("|")]
    assert [cell.strip() for cell in header.split("|")[3:-1]] == ["baseline", "model", "difference"]
    assert blocks[::3] == ["role-specific", "general"] and sum(map(int, blocks[1::3])) == len(questions)
    for block in blocks[2::3]:
        assert [line for line in block.split("\n") if line.startswith("|")][0].count("|") == header.count("|")
        assert "ROUGE-L" in block and "style" in block
    assert len(rows) == 9 and "model against baseline: " in whole  # what needs no likelihoods

    answered = (tmp_path / "answers.jsonl").stat().st_mtime_ns
    run(tuned, samples, tmp_path / "answers.jsonl", *more)
    assert (tmp_path / "answers.jsonl").stat().st_mtime_ns == answered
    assert capsys.readouterr().out == out


def test_each_role_and_each_round_has_the_same_rows(checkpoint, samples, tmp_path, capsys):
    run(checkpoint, samples, tmp_path / "answers.jsonl", "--by", "role")
    titles = re.findall(r"^(\S+) \((\d+)\)$", capsys.readouterr().out, re.MULTILINE)
    assert [title for title, _ in titles] == ["孙悟空", "李白", "张飞", "皇帝", "华妃"]
    assert sum(int(count) for _, count in titles) == len(answers_of(tmp_path / "answers.jsonl"))
    run(checkpoint, samples, tmp_path / "answers.jsonl", "--by", "round")
    assert "--by round: the test set does not say." in capsys.readouterr().out
    rounds = (None, ROOT / "data/sample/conversations_test.jsonl")
    run(checkpoint, rounds, tmp_path / "rounds.jsonl", "--by", "round", "--lang", "zh")
    titles = re.findall(r"^(\S+) \((\d+)\)$", capsys.readouterr().out, re.MULTILINE)
    assert [title for title, _ in titles] == ["第一轮", "第二轮", "第三轮及以后"]


def test_interrupted_runs_continue(checkpoint, samples, tmp_path):
    """Killed in its third batch, with a last line cut off, a run ends up with the draws of a run left in peace."""
    run(checkpoint, samples, tmp_path / "whole.jsonl", "--sample", "--batch_size", 16)
    script = """
import os, sys
import predict
answer_batch, batches = predict.answer_batch, []
def mortal(*arguments):
    batches.append(1)
    return answer_batch(*arguments) if len(batches) < 3 else os._exit(9)
predict.answer_batch = mortal
predict.main(sys.argv[1:])
"""
    flags = ["--model_path", checkpoint, "--test_path", samples[1], "--output_path", str(tmp_path / "torn.jsonl")]
    flags += ["--max_new_tokens", "4", "--sample", "--answers_only", "--batch_size", "16"]
    assert subprocess.run([sys.executable, "-c", script, *flags], cwd=ROOT).returncode == 9
    torn, part = tmp_path / "torn.jsonl", tmp_path / "torn.jsonl.part"
    assert len(answers_of(part)) == 32 and not torn.exists()
    part.write_bytes(part.read_bytes()[:-9])
    run(checkpoint, samples, torn, "--sample", "--batch_size", 16)
    assert answers_of(torn) == answers_of(tmp_path / "whole.jsonl") and not part.exists()


def failure(capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and "Traceback" not in error
    return error


def test_answers_under_other_settings_are_not_mixed(checkpoint, samples, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    run(checkpoint, samples, output)
    before = output.read_bytes()
    run(checkpoint, samples, output, "--batch_size", 5)  # not a setting that answers depend on
    assert output.read_bytes() == before and "other settings" not in capsys.readouterr().err
    for flags, told in ((("--max_new_tokens", 5), "max_new_tokens 4, now 5"), (("--sample",), "now 1234")):
        run(checkpoint, samples, output, *flags)
        err = capsys.readouterr().err
        assert f"{output}: was answered under other settings (" in err and told in err
        assert len(answers_of(output)) == before.count(b"\n") - 1
    assert '"sampling_seed": 1234' in output.read_text(encoding="utf-8").split("\n")[0]
    other = tmp_path / "test.json"
    other.write_text(open(samples[1], encoding="utf-8").readline(), encoding="utf-8")
    run(checkpoint, (None, other), output)
    assert len(answers_of(output)) == 1


def test_what_is_answered_anew_and_interrupted_goes_on_without_overwrite(checkpoint, samples, tmp_path, monkeypatch):
    output, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part"
    run(checkpoint, samples, output)
    answer_batch = predict.answer_batch

    def interrupted(*arguments):
        if part.exists() and len(answers_of(part)) >= 16:
            raise KeyboardInterrupt
        return answer_batch(*arguments)

    monkeypatch.setattr(predict, "answer_batch", interrupted)
    with pytest.raises(SystemExit):
        run(checkpoint, samples, output, "--max_new_tokens", 5, "--overwrite", "--batch_size", 16)
    assert not output.exists() and len(answers_of(part)) == 16
    done = part.read_text(encoding="utf-8")
    monkeypatch.setattr(predict, "answer_batch", answer_batch)
    run(checkpoint, samples, output, "--max_new_tokens", 5)
    assert output.read_text(encoding="utf-8").startswith(done)


def test_a_model_that_is_refused_leaves_all_answers_as_they_were(checkpoint, samples, tmp_path, monkeypatch, capsys):
    """Whole files and half ones: who answers is checked before a file is opened."""
    output, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part"
    run(checkpoint, samples, output)
    part.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:5]))
    before = output.read_bytes(), part.read_bytes()

    def refuse(*_):
        raise UserError("refused")

    monkeypatch.setattr(ModelDirectory, "refuse_to_fail_later", refuse)
    for flags in (["--overwrite"], ["--max_new_tokens", 5]):
        with pytest.raises(SystemExit):
            run(checkpoint, samples, output, *flags)
        assert capsys.readouterr().err.endswith("error: refused\n")
        assert (output.read_bytes(), part.read_bytes()) == before


def test_answers_of_a_model_that_has_changed_are_not_reused(checkpoint, samples, tmp_path, capsys):
    """Neither whole files of answers nor half ones: the directory has the same name, its files the same sizes."""
    model, output, part = tmp_path / "model", tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part"
    shutil.copytree(checkpoint, model)
    run(model, samples, output)
    old, told = answers_of(output), "other settings (the weights, generation_config.json or the questions)"

    weights = load_file(model / "model.safetensors")
    size = (model / "model.safetensors").stat().st_size
    save_file(
        weights | {"lm_head.weight": weights["lm_head.weight"].flip(0)}, model / "model.safetensors", {"format": "pt"}
    )
    assert (model / "model.safetensors").stat().st_size == size
    shutil.copy(output, part)
    run(model, samples, output)
    new = answers_of(output)
    assert new.keys() == old.keys() and all(new[number] != old[number] for number in old)
    assert told in capsys.readouterr().err and not part.exists()

    settings = (model / "generation_config.json").read_text()
    (model / "generation_config.json").write_text(settings.replace("0.85", "0.95"))
    run(model, samples, output)
    assert told in capsys.readouterr().err


def test_a_file_of_something_else_is_left_alone(checkpoint, samples, tmp_path, capsys):
    diary = tmp_path / "diary.txt"
    for content in ("Dear diary", '{"a": 1}\n{"b": 2}\ntorn', "\n"):
        diary.write_text(content)
        assert "is no file of answers" in failure(capsys, checkpoint, samples, diary)
        assert diary.read_text() == content
    assert "is another file of this run" in failure(capsys, checkpoint, samples, samples[1])
    output = tmp_path / "answers.jsonl"
    for path in (output, tmp_path / "answers-baseline.jsonl", samples[1], ROOT / "data/sample/attacks-zh.jsonl"):
        told = failure(capsys, checkpoint, samples, output, "--baseline_path", checkpoint, "--html", path)
        assert f"--html {path}: is " in told and not output.exists()


def test_wrong_arguments_are_told_at_once(checkpoint, samples, tmp_path, capsys):
    adapter = make_adapter(checkpoint, tmp_path / "adapter")
    flags = ["--baseline_path", tmp_path / "none", "--batch_size", 0, "--device", "tpu"]
    error = failure(capsys, adapter, (None, tmp_path / "none.json"), tmp_path / "answers.jsonl", *flags)
    assert error.count("error: ") == 5
    for words in ("merge_params.py first", "--batch_size 0", "--device tpu", "none.json"):
        assert words in error
    assert "exceed 4096 tokens" in failure(
        capsys, checkpoint, samples, tmp_path / "answers.jsonl", "--max_new_tokens", 4090
    )
    assert "--engine_model: belongs to --engine" in failure(
        capsys, checkpoint, samples, tmp_path / "answers.jsonl", "--engine_model", "role"
    )
    # The text of fewer characters has more tokens: the tokenizer spells 龘 by its bytes.
    systems = ("你" * 1500, "龘" * 1000)
    lines = [
        {"role": name, "system": system, "prompt": "问", "response": "答"} for name, system in zip("甲乙", systems)
    ]
    (tmp_path / "long.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = failure(capsys, checkpoint, (None, tmp_path / "long.json"), tmp_path / "a.jsonl", "--max_new_tokens", 2000)
    assert "a system text and --max_new_tokens 2000 exceed" in told
    assert not (tmp_path / "answers.jsonl").exists()


def test_scores_do_not_depend_on_the_batch_size(checkpoint, few_samples, tmp_path, capsys):
    tables = []
    for size in (1, 3, 64):
        flags = ["--batch_size", size, "--train_path", few_samples[0], "--max_new_tokens", 40, "--overwrite"]
        run(checkpoint, few_samples, tmp_path / f"{size}.jsonl", *flags)
        out = capsys.readouterr().out
        tables.append(out)
        assert answers_of(tmp_path / f"{size}.jsonl") == answers_of(tmp_path / "1.jsonl")
    assert tables[0] == tables[1] == tables[2] and "copied answers" in tables[0]


# ---------------------------------------------------------------- adapters


def test_adapters_answer_as_their_merged_models_do_and_their_base_is_read_once(
    checkpoint, samples, tmp_path, capsys, monkeypatch
):
    adapters = [make_adapter(checkpoint, tmp_path / name, spread) for name, spread in (("one", 0.1), ("two", 0.3))]
    loaded, load = [], ModelDirectory.load
    monkeypatch.setattr(ModelDirectory, "load", lambda self, **how: loaded.append(self.path) or load(self, **how))
    output = tmp_path / "answers.jsonl"
    run(checkpoint, samples, output, "--baseline_path", checkpoint, "--adapter_path", *adapters)
    out = capsys.readouterr().out
    assert loaded == [Path(checkpoint)]
    header = [cell.strip() for cell in out.split("\n")[1].split("|")[3:-1]]
    assert header == ["baseline", "one", "two", "one − baseline", "two − baseline"]
    assert "\none against baseline: " in out and "\ntwo against baseline: " in out

    answers = [answers_of(tmp_path / f"answers-{name}.jsonl") for name in ("baseline", "one", "two")]
    assert all(len(own) == len(answers[0]) for own in answers)
    run(checkpoint, samples, tmp_path / "base.jsonl")
    assert answers[0] == answers_of(tmp_path / "base.jsonl")
    for adapter, own in zip(adapters, answers[1:]):
        merged = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), adapter).merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        BaichuanTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "merged")
        run(tmp_path / "merged", samples, tmp_path / "merged.jsonl", "--overwrite")
        assert own == answers_of(tmp_path / "merged.jsonl") != answers[0]


def test_answers_of_an_adapter_that_has_changed_are_not_reused(checkpoint, samples, tmp_path, capsys):
    adapter = make_adapter(checkpoint, tmp_path / "adapter")
    run(checkpoint, samples, tmp_path / "answers.jsonl", "--adapter_path", adapter)
    shutil.rmtree(adapter)
    make_adapter(checkpoint, tmp_path / "adapter", spread=0.3)
    run(checkpoint, samples, tmp_path / "answers.jsonl", "--adapter_path", adapter)
    assert "was answered under other settings" in capsys.readouterr().err


# ---------------------------------------------------------------- questions


def test_questions_are_distinct_and_keep_their_references_and_kinds(tmp_path):
    """data_helper.py's own lines: two recorded answers of one question are two lines, and one question here."""
    profiles = {"张飞": {"description": "猛将。", "names": ["张将军"]}, "李白": "诗人。"}
    rows = [
        {"role": "张飞", "question": "张将军，你怕谁？", "generated": ["俺谁也不怕！", "吃我一矛！"]},
        {"role": "李白", "question": "你怕谁？", "generated": ["怕酒杯空。"]},
    ]
    general = [{"role": "张飞", "question": "1 + 1 = ?", "generated": ["二"]}]
    for name, lines in (("role_specific_test", rows), ("general_test", general), ("general_train", general)):
        path = tmp_path / f"rolebench-zh_{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "profiles-zh_desc.json").write_text(json.dumps(profiles))
    train, test = tmp_path / "train.json", tmp_path / "test.json"
    paths = ["--data_dir", tmp_path, "--train_path", train, "--test_path", test]
    data_helper.main([*map(str, paths), "--roles", "all"])
    assert "kind" not in train.read_text(encoding="utf-8")
    questions = predict.read_questions(test)
    assert [(q.role, q.prompt, q.kind, sorted(q.references)) for q in questions] == [
        ("张飞", "你怕谁？", "role-specific", ["俺谁也不怕！", "吃我一矛！"]),
        ("李白", "你怕谁？", "role-specific", ["怕酒杯空。"]),
        ("张飞", "1 + 1 = ?", "general", ["二"]),
    ]
    own = {"role": "诸葛亮", "system": "", "prompt": "空城计？", "response": "亮一生谨慎。"}
    test.write_text(test.read_text(encoding="utf-8") + json.dumps(own) + "\n", encoding="utf-8")
    assert predict.read_questions(test)[-1].kind == "other"
    test.write_text(json.dumps(own | {"kind": 3}), encoding="utf-8")  # a key of somebody else's
    assert [question.kind for question in predict.read_questions(test)] == [None]


def test_roles_without_a_system_text_keep_their_own_answers(tmp_path):
    samples = [{"role": role, "system": "", "prompt": "你好", "response": role} for role in "甲乙甲"]
    (tmp_path / "test.json").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    questions = predict.read_questions(tmp_path / "test.json")
    assert [(q.role, q.references) for q in questions] == [("甲", ["甲", "甲"]), ("乙", ["乙"])]


def test_every_round_of_a_conversation_is_a_question(tmp_path):
    """With the recorded history; endings of one beginning share its rounds; what is not to be trained is no reference."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate("甲乙丙丁戊己庚辛")]
    ending = [*turns[:3], {"role": "assistant", "content": "另"}]
    unsure = [*turns[:1], {**turns[1], "train": False}, *turns[2:4]]
    samples = [{"role": "李白", "system": "诗", "messages": messages} for messages in (turns, ending, unsure)]
    (tmp_path / "test.json").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    questions = predict.read_questions(tmp_path / "test.json")
    assert [(q.prompt, q.round, q.references) for q in questions] == [
        ("甲", "round 1", ["乙", "乙"]),
        ("丙", "round 2", ["丁", "另", "丁"]),
        ("戊", "round 3+", ["己"]),
        ("庚", "round 3+", ["辛"]),
    ]
    assert questions[3].messages == [{"role": "system", "content": "诗"}, *turns[:7]]


# ---------------------------------------------------------------- scores from likelihoods


@pytest.fixture
def few_attacks(tmp_path):
    """One attack of each kind, one of them of three rounds, and a boundary question."""
    lines = (ROOT / "data/sample/attacks-zh.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "attacks.jsonl"
    path.write_text("\n".join([lines[0], lines[62], lines[-1]]), encoding="utf-8")
    return path


def printed(capsys, *flags) -> str:
    common = ["--train_path", "none.json", "--resamples", 10, "--max_new_tokens", 3, "--lang", "en"]
    predict.main([str(flag) for flag in (*common, *flags)])
    return capsys.readouterr().out


def test_predict_prints_one_table_and_a_second_run_the_same(checkpoint, few_samples, few_attacks, tmp_path, capsys):
    adapter = make_adapter(checkpoint, tmp_path / "adapter")
    tuned = tmp_path / "tuned"
    base = BaichuanForCausalLM.from_pretrained(checkpoint)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(tuned)
    BaichuanTokenizer.from_pretrained(checkpoint).save_pretrained(tuned)
    flags = ["--model_path", tuned, "--baseline_path", checkpoint, "--test_path", few_samples[1]]
    flags += ["--output_path", tmp_path / "answers.jsonl", "--attacks", few_attacks, "--html", tmp_path / "report.html"]
    flags += ["--train_path", few_samples[0]]
    out = printed(capsys, *flags)
    assert len(out.splitlines()) <= 40
    for name in MEASURES.keys() - {"who_said_it_shared"}:
        assert f"\n| {texts('en')[name]}" in out
    assert out.count("\n|--") == 1 and "\nmodel against baseline: " in out
    roles = {sample["role"] for sample in read_samples(few_samples[1])}
    for name in ("answers-attacks.jsonl", "answers-baseline-attacks.jsonl"):
        assert (tmp_path / name).read_text(encoding="utf-8").count("\n") == 1 + 2 * len(roles)
    again = printed(capsys, *flags, "--batch_size", 3)
    assert again == out
    few_attacks.write_text(few_attacks.read_text(encoding="utf-8").replace("？", "！"), encoding="utf-8")
    whole = (tmp_path / "answers.jsonl").read_bytes()
    predict.main([str(flag) for flag in (*flags, "--resamples", 10, "--max_new_tokens", 3)])
    err = capsys.readouterr().err  # other attacks are answered anew, and they alone
    assert "has all answers of model already" in err and "answers-attacks.jsonl: was answered under other" in err
    first, second = (tmp_path / "answers-attacks.jsonl").read_text(encoding="utf-8").split("\n")[:2]
    assert "！" in json.loads(second)["prompt"] and (tmp_path / "answers.jsonl").read_bytes() == whole
    (tmp_path / "answers-attacks.jsonl").write_text("Dear diary\n")
    with pytest.raises(SystemExit):
        printed(capsys, *flags, "--baseline_path", tuned)  # which is told before the new baseline answers
    assert "answers-attacks.jsonl: is no file of answers" in capsys.readouterr().err
    (tmp_path / "answers-attacks.jsonl").unlink()
    alone = printed(capsys, *flags, "--answers_only")
    assert "ROUGE-L" in alone and "who said it" not in alone


def test_wrong_files_are_told_before_anything_slow(checkpoint, few_samples, tmp_path, capsys):
    (tmp_path / "attacks.jsonl").write_text('{"kind": 1}\n', encoding="utf-8")
    flags = ["--model_path", checkpoint, "--test_path", few_samples[1], "--output_path", tmp_path / "answers.jsonl"]
    flags += ["--attacks", tmp_path / "attacks.jsonl", "--plain_text", tmp_path / "none.txt"]
    with pytest.raises(SystemExit) as exit:
        printed(capsys, *flags)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "attacks.jsonl:1: " in error and "none.txt: there is no such file" in error
    assert not (tmp_path / "answers.jsonl").exists()


def test_questions_become_samples_of_their_own_answers(checkpoint):
    """Of a conversation each round is read by itself, after the recorded history, and each text counts once."""
    path = ROOT / "data/sample/conversations_test.jsonl"
    samples = predict.recorded_samples(predict.read_questions(path))
    answers = [turn["content"] for s in read_samples(path) for turn in s["messages"] if turn["role"] == "assistant"]
    assert sorted(sample["messages"][-1]["content"] for sample in samples) == sorted(answers)
    model, tokenizer = BaichuanForCausalLM.from_pretrained(checkpoint), BaichuanTokenizer.from_pretrained(checkpoint)
    said = read_personas(Likelihood(model.eval(), tokenizer), samples)
    lengths = [len(tokenizer.text_to_ids(sample["messages"][-1]["content"])) + 1 for sample in samples]
    assert said.tokens.tolist() == lengths
    assert set(said.items.round) == {"round 1", "round 2", "round 3+"} and set(said.items.kind) == {None}
    models = {"model": persona_scores(said)}
    counts = {label: compare(models, 2, 1, "round", label)[0].count for label in dict.fromkeys(said.items.round)}
    assert sum(counts.values()) == len(samples)


def test_roles_without_a_name_are_not_attacked(checkpoint, samples, tmp_path, capsys):
    lines = [json.loads(line) for line in open(samples[1], encoding="utf-8")][:3]
    test = tmp_path / "test.json"
    test.write_text("".join(json.dumps(line | {"role": ""}) + "\n" for line in lines), encoding="utf-8")
    out = printed(capsys, "--model_path", checkpoint, "--test_path", test, "--output_path", tmp_path / "answers.jsonl")
    assert "attacks: " not in out and "loss with the role's own" in out and "roles: 0." in out
    assert not (tmp_path / "answers-attacks.jsonl").exists()


def test_models_of_different_context_lengths_are_measured_on_the_same_answers(
    checkpoint, samples, few_attacks, tmp_path, capsys
):
    """The answer that one of them could not read whole is left out for both."""
    short = tmp_path / "short"
    shutil.copytree(checkpoint, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"model_max_length": 300, "max_position_embeddings": 300}))
    lines = [json.loads(line) for line in open(samples[1], encoding="utf-8")][:6]
    lines[1]["response"] *= 30
    test = tmp_path / "test.json"
    test.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    flags = ["--model_path", checkpoint, "--baseline_path", short, "--attacks", few_attacks, "--test_path", test]
    out = printed(capsys, *flags, "--output_path", tmp_path / "answers.jsonl")
    (loss,) = (line for line in out.split("\n") if "loss with the role's own" in line)
    assert loss.split("|")[3].strip() == loss.split("|")[4].strip()  # the same weights, the same answers


def test_nothing_that_fits_makes_no_row(samples):
    questions = predict.read_questions(samples[1])
    said = read_personas(lambda samples: [np.empty(0)] * len(samples), predict.recorded_samples(questions))
    assert len(said.role) == 0 and persona_scores(said) == {}
