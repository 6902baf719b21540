"""predict.py: interrupted runs lose nothing, answers of other settings are not mixed, and one table shows the scores."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, answers_of, conversation, make_adapter, merge, turns, write_lines
from safetensors.torch import load_file, save_file

import data_helper
import predict
from baichuan import BaichuanTokenizer
from support.dialogues.samples import read_samples
from support.errors import UserError
from support.model.directory import ModelDirectory
from support.scores.likelihood import Likelihood
from support.scores.persona import persona_scores, read_personas
from support.scores.table import MEASURES, compare, texts

# ---------------------------------------------------------------- the script


def run(checkpoint, samples, output, *more, only=("--answers_only",)):
    flags = ["--model_path", checkpoint, "--test_path", samples[1], "--output_path", output, "--max_new_tokens", 4]
    flags += ["--lang", "en", "--resamples", 20, "--train_path", "none.json", *only]
    predict.main([str(flag) for flag in (*flags, *more)])


def failure(capsys, *arguments, **options) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run(*arguments, **options)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "error: " in error and "Traceback" not in error
    return error


@pytest.fixture
def few_attacks(tmp_path):
    """One attack, another of three rounds, and a boundary question."""
    lines = (ROOT / "data/sample/attacks-zh.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "attacks.jsonl"
    path.write_text("\n".join([lines[0], lines[62], lines[-1]]), encoding="utf-8")
    return path


def test_whole_script_prints_all_measures_and_a_second_run_the_same(
    checkpoint, few_samples, few_attacks, tmp_path, capsys
):
    output = tmp_path / "answers.jsonl"
    tuned = merge(checkpoint, make_adapter(checkpoint, tmp_path / "adapter"), tmp_path / "tuned", "--probes", 1)
    capsys.readouterr()
    flags = ["--baseline_path", checkpoint, "--attacks", few_attacks, "--html", tmp_path / "report.html"]
    flags += ["--train_path", few_samples[0], "--by", "kind"]
    run(tuned, few_samples, output, *flags, only=())
    out = capsys.readouterr().out

    whole, *blocks = re.split(r"\n(role-specific|general) questions \((\d+)\)\n", out)
    for name in MEASURES.keys() - {"who_said_it_shared"}:
        assert f"\n| {texts('en')[name]}" in whole
    assert "\nQuestions: 5, roles: 4." in whole and "\nmodel against baseline: " in whole
    header = [line for line in whole.split("\n") if line.startswith("|")][0]
    assert [cell.strip() for cell in header.split("|")[3:-1]] == ["baseline", "model", "difference"]
    assert blocks[::3] == ["role-specific", "general"] and sum(map(int, blocks[1::3])) == 5
    assert all("ROUGE-L" in block and "style" in block for block in blocks[2::3])
    for name, count in (("", 5), ("-baseline", 5), ("-attacks", 8), ("-baseline-attacks", 8)):
        assert len(answers_of(tmp_path / f"answers{name}.jsonl")) == count

    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("sounds like ") == 2 * 5 and "Who is heard as whom" in page

    answered = output.stat().st_mtime_ns
    run(tuned, few_samples, output, *flags, "--batch_size", 3, only=())
    assert capsys.readouterr().out == out and output.stat().st_mtime_ns == answered


def test_each_role_and_each_round_has_the_same_rows(checkpoint, few_samples, tmp_path, capsys):
    run(checkpoint, few_samples, tmp_path / "answers.jsonl", "--by", "role")
    out = capsys.readouterr().out
    titles = re.findall(r"^(\S+) \((\d+)\)$", out, re.MULTILINE)
    assert titles == [("孙悟空", "1"), ("李白", "1"), ("张飞", "2"), ("华妃", "1")] and "who said it" not in out
    run(checkpoint, few_samples, tmp_path / "answers.jsonl", "--by", "round")
    assert "--by round: the test set does not say." in capsys.readouterr().out
    rounds = (None, ROOT / "data/sample/conversations_test.jsonl")
    run(checkpoint, rounds, tmp_path / "rounds.jsonl", "--by", "round", "--lang", "zh")
    titles = re.findall(r"^(\S+) \((\d+)\)$", capsys.readouterr().out, re.MULTILINE)
    assert [title for title, _ in titles] == ["第一轮", "第二轮", "第三轮及以后"]


@pytest.mark.parametrize("more", [["--sample"], ["--overwrite"]], ids=" ".join)
def test_interrupted_runs_continue(checkpoint, few_samples, tmp_path, monkeypatch, more):
    """Killed in its third batch, with a last line cut off, a run ends up with the draws of a run left in peace.

    One that answers anew goes on without --overwrite, and leaves none of the old answers for the new ones.
    """
    output, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part"
    run(checkpoint, few_samples, output, *more, "--batch_size", 2)
    whole, on_disk = answers_of(output), []
    if "--sample" in more:
        output.unlink()
    with monkeypatch.context() as patched:

        def mortal(*arguments):
            if part.exists() and len(answers_of(part)) == 4:
                on_disk.append(part.read_bytes())  # what a kill at this moment leaves
                assert not output.exists()
                raise KeyboardInterrupt
            return answer_batch(*arguments)

        answer_batch = predict.answer_batch
        patched.setattr(predict, "answer_batch", mortal)
        with pytest.raises(SystemExit):
            run(checkpoint, few_samples, output, *more, "--batch_size", 2)
    part.write_bytes(on_disk[0][:-9])
    again = ["--sample"] if "--sample" in more else []
    run(checkpoint, few_samples, output, *again, "--batch_size", 2)
    assert answers_of(output) == whole and not part.exists()
    assert output.read_bytes().startswith(on_disk[0][: on_disk[0].rfind(b"\n", 0, -9) + 1])


def test_no_answer_is_lost_whatever_is_cut_off(checkpoint, few_samples, tmp_path, monkeypatch, capsys):
    """Only what is missing is answered again, and the settings stand above all of them, however the two files were left."""
    output, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part"
    run(checkpoint, few_samples, output)
    whole, table = output.read_bytes(), capsys.readouterr().out
    lines, expected = whole.splitlines(keepends=True), answers_of(output)
    answered, answer_batch = [], predict.answer_batch
    other = [lines[0].replace(b'"max_new_tokens": 4', b'"max_new_tokens": 9'), *lines[1:]]

    def counted(model, tokenizer, batch, config):
        answered.extend(batch)
        return answer_batch(model, tokenizer, batch, config)

    monkeypatch.setattr(predict, "answer_batch", counted)
    nothing = None
    for at_path, at_part, missing in (
        (lines[:-1], nothing, 1),
        ([*lines[:-1], lines[-1][:9]], nothing, 1),
        ([whole[:-1]], nothing, 0),  # without the last newline
        (lines[:-2], [lines[0], lines[-1]], 1),  # both files hold some
        (lines[:-2], other[:3], 2),  # under other settings answers are of no use
        (other, lines[:-1], 1),
        (nothing, [lines[0][:9]], 5),
        (nothing, [lines[0][:40]], 5),
        (lines[:-1], [lines[0][:40]], 1),
        (lines[:-1], [], 1),
        (lines[:1], [], 5),
        (nothing, [lines[0][:-1]], 5),
        ([], nothing, 5),
    ):
        for path, content in ((output, at_path), (part, at_part)):
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(b"".join(content))
        answered.clear()
        run(checkpoint, few_samples, output, "--batch_size", 1)
        assert len(answered) == missing and not part.exists(), (at_path, at_part)
        assert output.read_bytes().startswith(lines[0]) and answers_of(output) == expected
        told = capsys.readouterr()
        assert told.out == table and "under other settings" not in told.err


def test_answers_under_other_settings_are_not_mixed(checkpoint, few_samples, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    run(checkpoint, few_samples, output)
    before = output.read_bytes()
    run(checkpoint, few_samples, output, "--batch_size", 2)  # not a setting that answers depend on
    assert output.read_bytes() == before and "other settings" not in capsys.readouterr().err
    for flags, told in ((("--max_new_tokens", 5), "max_new_tokens"), (("--sample",), "max_new_tokens, sampling_seed")):
        run(checkpoint, few_samples, output, *flags)
        assert f"{output}: was answered under other settings ({told}): " in capsys.readouterr().err
        assert len(answers_of(output)) == 5
    assert '"sampling_seed": 1234' in output.read_text(encoding="utf-8").split("\n")[0]


def test_a_copied_model_goes_on_with_the_answers_that_are_there(checkpoint, few_samples, tmp_path, capsys):
    output, part, copy = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part", tmp_path / "copy"
    run(checkpoint, few_samples, output)
    before = output.read_bytes()
    output.unlink()
    part.write_bytes(b"".join(before.splitlines(keepends=True)[:3]))
    shutil.copytree(checkpoint, copy, copy_function=shutil.copyfile)  # as cp -r does: another name, other times
    run(copy, few_samples, output)
    assert output.read_bytes() == before and "under other settings" not in capsys.readouterr().err
    run(checkpoint, few_samples, output)
    assert "has all answers of model already" in capsys.readouterr().err
    config, weights = copy / "generation_config.json", copy / "model.safetensors"
    config.write_text(config.read_text().replace("0.85", "0.95"))
    run(copy, few_samples, output)
    assert "under other settings (digest): all is answered anew" in capsys.readouterr().err
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    run(copy, few_samples, output)
    assert "under other settings (model): all is answered anew" in capsys.readouterr().err


def test_answers_depend_on_weights_settings_adapter_and_questions(checkpoint, few_samples, tmp_path):
    model, adapter = shutil.copytree(checkpoint, tmp_path / "model"), make_adapter(checkpoint, tmp_path / "adapter")
    args = predict.parse_args(["--model_path", str(model), "--adapter_path", str(adapter)])
    questions = predict.read_questions(few_samples[1])

    def settings(questions=questions):
        (candidate,) = predict.name_candidates(args)
        return predict.version_of(args, candidate, questions)

    found = [settings(), settings(questions[1:])]
    weights, config = model / "model.safetensors", model / "generation_config.json"
    config.write_text(config.read_text().replace("0.85", "0.95"))
    found.append(settings())
    for alpha in (16, 8):
        make_adapter(checkpoint, adapter, spread=0.3, lora_alpha=alpha)
        found.append(settings())
    assert settings() == found[-1] and len({own.pop("digest") for own in found}) == len(found)
    assert all(own == found[0] for own in found)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    found.append(settings())
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(rounded, weights, metadata={"format": "pt"})  # what it computes with differs, too
    found.append(settings())
    assert len({own["model"] for own in found[-3:]}) == 3


def test_a_model_that_is_refused_leaves_all_answers_as_they_were(
    checkpoint, few_samples, tmp_path, monkeypatch, capsys
):
    """Whole files and half ones: who answers is checked before a file is opened."""
    output, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part"
    run(checkpoint, few_samples, output)
    part.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:3]))
    before = output.read_bytes(), part.read_bytes()

    def refuse(*_):
        raise UserError("refused")

    monkeypatch.setattr(ModelDirectory, "refuse_to_fail_later", refuse)
    for flags in (["--overwrite"], ["--max_new_tokens", 5]):
        with pytest.raises(SystemExit):
            run(checkpoint, few_samples, output, *flags)
        assert capsys.readouterr().err.endswith("error: refused\n")
        assert (output.read_bytes(), part.read_bytes()) == before


def test_a_file_of_something_else_is_left_alone(checkpoint, few_samples, tmp_path, capsys):
    diary = tmp_path / "diary-attacks.txt"
    for content in ("Dear diary", '{"a": 1}\n{"b": 2}\ntorn'):
        diary.write_text(content)
        for output in (diary, tmp_path / "diary.txt"):
            assert "is no file of answers" in failure(capsys, checkpoint, few_samples, output)
        assert diary.read_text() == content
    assert "no regular file" in failure(capsys, checkpoint, few_samples, "/dev/null")


def test_wrong_arguments_and_files_are_told_at_once(checkpoint, few_samples, tmp_path, capsys):
    output, adapter = tmp_path / "answers.jsonl", make_adapter(checkpoint, tmp_path / "adapter")
    (tmp_path / "attacks.jsonl").write_text('{"kind": 1}\n', encoding="utf-8")
    flags = ["--baseline_path", tmp_path / "none", "--device", "tpu", "--plain_text", tmp_path / "none.txt"]
    flags += ["--attacks", tmp_path / "attacks.jsonl", "--html", "/dev/null/x"]
    error = failure(capsys, adapter, (None, tmp_path / "none.json"), output, *flags, only=())
    assert error.count("error: ") == 7
    wanted = ["merge_params.py first", "none: there is no such directory", "--device tpu", "none.json: is no file"]
    for words in (*wanted, "attacks.jsonl:1: ", "none.txt: is no file", "/dev/null/x: cannot be written"):
        assert words in error
    assert "leaves no room" in failure(capsys, checkpoint, few_samples, output, "--max_new_tokens", 4090)
    assert "not allowed with argument" in failure(capsys, checkpoint, few_samples, output, "--engine", "http://x/v1")
    assert "--batch_size: 0 is no integer" in failure(capsys, checkpoint, few_samples, output, "--batch_size", 0)
    assert not output.exists()


def test_adapters_answer_as_their_merged_models_do_and_their_base_is_read_once(
    checkpoint, few_samples, tmp_path, capsys, monkeypatch
):
    adapters = [make_adapter(checkpoint, tmp_path / name, spread) for name, spread in (("one", 0.1), ("two", 0.3))]
    loaded, load = [], ModelDirectory.load
    monkeypatch.setattr(ModelDirectory, "load", lambda self, **how: loaded.append(self.path) or load(self, **how))
    output = tmp_path / "answers.jsonl"
    run(checkpoint, few_samples, output, "--baseline_path", checkpoint, "--adapter_path", *adapters)
    out = capsys.readouterr().out
    assert loaded == [Path(checkpoint)]
    header = [cell.strip() for cell in out.split("\n")[1].split("|")[3:-1]]
    assert header == ["baseline", "one", "two", "one − baseline", "two − baseline"]
    assert "\none against baseline: " in out and "\ntwo against baseline: " in out

    answers = [answers_of(tmp_path / f"answers-{name}.jsonl") for name in ("baseline", "one", "two")]
    merged = [merge(checkpoint, own, tmp_path / f"{own.name}-merged", "--probes", 1) for own in adapters]
    for model, own in zip([checkpoint, *merged], answers):
        alone = tmp_path / f"{Path(model).name}.jsonl"
        run(model, few_samples, alone)
        assert own == answers_of(alone)
    assert answers[0] != answers[1] != answers[2]


def test_as_many_are_answered_at_a_time_as_fit(checkpoint, few_samples, tmp_path, monkeypatch):
    """By the longest persona with its question, and the answer behind it; what is drawn depends on no machine's memory."""
    lengths, sizes, in_batches = [], [], predict.in_batches

    def batches(answer, order, size, done):
        sizes.append(size)
        return in_batches(answer, order, size, done)

    monkeypatch.setattr(predict, "in_batches", batches)
    monkeypatch.setattr(predict, "rows_that_fit", lambda model, tokens: lengths.append(tokens) or 3)
    for flags in ([], ["--sample"], ["--batch_size", 2]):
        run(checkpoint, few_samples, tmp_path / "answers.jsonl", "--overwrite", *flags)
    tokenizer = BaichuanTokenizer.from_pretrained(checkpoint)
    texts = [sample["system"] + sample["messages"][0]["content"] for sample in read_samples(few_samples[1])]
    assert lengths == [max(map(len, tokenizer.text_to_ids(texts))) + 4] and sizes == [3, 16, 2]


def test_adapters_of_one_name_are_told_apart():
    paths = ["a/run/epoch-1-step-300", "b/run/epoch-1-step-300"]
    args = predict.parse_args(["--model_path", "base", "--adapter_path", *paths])
    names = [candidate.name for candidate in predict.name_candidates(args)]
    assert names[0].endswith("a-run-epoch-1-step-300") and names[1].endswith("b-run-epoch-1-step-300")
    assert len({candidate.output for candidate in predict.name_candidates(args)}) == 2


# ---------------------------------------------------------------- questions


def test_questions_are_distinct_and_keep_their_references_and_kinds(tmp_path):
    """data_helper.py's own lines: two recorded answers of one question are two lines, and one question here."""
    profiles = {"张飞": {"description": "猛将。", "names": ["张将军"]}, "李白": "诗人。"}
    rows = [
        {"role": "张飞", "question": "张将军，你怕谁？", "generated": ["俺谁也不怕！", "吃我一矛！"]},
        {"role": "李白", "question": "你怕谁？", "generated": ["怕酒杯空。"]},
    ]
    general = [{"role": "张飞", "question": "1 + 1 = ?", "generated": ["二"]}]
    for name, lines in (
        ("role_specific_test", rows),
        ("general_test", general),
        ("general_train", [general[0] | {"generated": ["两个"]}]),
    ):
        write_lines(tmp_path / f"rolebench-zh_{name}.jsonl", *lines)
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
    with open(test, "a", encoding="utf-8") as file:
        file.write(json.dumps(own))
    assert predict.read_questions(test)[-1].kind == "other"
    write_lines(test, *(own | {"role": role, "response": role} for role in "甲乙甲"))  # the same words, two roles
    assert [(q.role, q.references) for q in predict.read_questions(test)] == [("甲", ["甲", "甲"]), ("乙", ["乙"])]
    write_lines(test, own | {"kind": 3})  # a key of somebody else's
    assert [question.kind for question in predict.read_questions(test)] == [None]


def test_every_round_of_a_conversation_is_a_question(tmp_path):
    """With the recorded history; endings of one beginning share its rounds; what is not to be trained is no reference."""
    texts = "甲乙丙丁戊己庚辛"
    samples = [conversation("诗", *texts), conversation("诗", *"甲乙丙另"), conversation("诗", *"甲乙丙丁", silent=[1])]
    write_lines(tmp_path / "test.json", *samples)
    questions = predict.read_questions(tmp_path / "test.json")
    assert [(q.prompt, q.round, q.references) for q in questions] == [
        ("甲", "round 1", ["乙", "乙"]),
        ("丙", "round 2", ["丁", "另", "丁"]),
        ("戊", "round 3+", ["己"]),
        ("庚", "round 3+", ["辛"]),
    ]
    assert questions[3].messages == [{"role": "system", "content": "诗"}, *turns(*texts[:7])]


# ---------------------------------------------------------------- scores from likelihoods


def test_questions_become_samples_of_their_own_answers(checkpoint, model):
    """Of a conversation each round is read by itself, after the recorded history, and each text counts once."""
    path = ROOT / "data/sample/conversations_test.jsonl"
    samples = predict.recorded_samples(predict.read_questions(path))
    answers = [turn["content"] for s in read_samples(path) for turn in s["messages"] if turn["role"] == "assistant"]
    assert sorted(sample["messages"][-1]["content"] for sample in samples) == sorted(answers)
    tokenizer = BaichuanTokenizer.from_pretrained(checkpoint)
    said = read_personas(Likelihood(model, tokenizer), samples)
    lengths = [len(tokenizer.text_to_ids(sample["messages"][-1]["content"])) + 1 for sample in samples]
    assert said.tokens.tolist() == lengths
    assert set(said.items.round) == {"round 1", "round 2", "round 3+"} and set(said.items.kind) == {None}
    models = {"model": persona_scores(said)}
    counts = {label: compare(models, 2, 1, "round", label)[0].count for label in dict.fromkeys(said.items.round)}
    assert sum(counts.values()) == len(samples)


def test_roles_without_a_name_are_not_attacked(checkpoint, few_samples, tmp_path, capsys):
    lines = [json.loads(line) for line in open(few_samples[1], encoding="utf-8")][:2]
    write_lines(tmp_path / "test.json", *(line | {"role": ""} for line in lines))
    run(checkpoint, (None, tmp_path / "test.json"), tmp_path / "answers.jsonl", only=())
    out = capsys.readouterr().out
    assert "attacks: " not in out and "loss with the role's own" in out and "roles: 0." in out
    assert not (tmp_path / "answers-attacks.jsonl").exists()


def test_models_of_different_context_lengths_are_measured_on_the_same_answers(
    checkpoint, few_samples, few_attacks, tmp_path, capsys
):
    """The answer that one of them could not read whole is left out for both."""
    short = shutil.copytree(checkpoint, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"model_max_length": 300, "max_position_embeddings": 300}))
    lines = [json.loads(line) for line in open(few_samples[1], encoding="utf-8")]
    lines[1]["response"] *= 30
    write_lines(tmp_path / "test.json", *lines)
    flags = ["--baseline_path", short, "--attacks", few_attacks]
    run(checkpoint, (None, tmp_path / "test.json"), tmp_path / "answers.jsonl", *flags, only=())
    (loss,) = (line for line in capsys.readouterr().out.split("\n") if "loss with the role's own" in line)
    assert loss.split("|")[3].strip() == loss.split("|")[4].strip()  # the same weights, the same answers
