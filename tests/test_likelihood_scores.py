"""predict.py with its scores from likelihoods, as a user runs it; and its questions as what is read for them."""

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT
from peft import PeftModel
from test_merge_params import make_adapter

import predict
from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from support.dialogues.samples import read_samples
from support.scores.likelihood import Likelihood
from support.scores.persona import persona_scores, read_personas
from support.scores.table import MEASURES, compare, texts


@pytest.fixture
def few_attacks(tmp_path):
    """One attack of each kind, one of them of three rounds, and a boundary question."""
    lines = (ROOT / "data/sample/attacks-zh.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "attacks.jsonl"
    path.write_text("\n".join([lines[0], lines[62], lines[-1]]), encoding="utf-8")
    return path


def run(capsys, *flags) -> str:
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
    out = run(capsys, *flags)
    assert len(out.splitlines()) <= 40
    for name in MEASURES.keys() - {"who_said_it_shared"}:
        assert f"\n| {texts('en')[name]}" in out
    assert out.count("\n|--") == 1 and "\nmodel against baseline: " in out
    roles = {sample["role"] for sample in read_samples(few_samples[1])}
    for name in ("answers-attacks.jsonl", "answers-baseline-attacks.jsonl"):
        assert (tmp_path / name).read_text(encoding="utf-8").count("\n") == 1 + 2 * len(roles)
    again = run(capsys, *flags, "--batch_size", 3)
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
        run(capsys, *flags, "--baseline_path", tuned)  # which is told before the new baseline answers
    assert "answers-attacks.jsonl: is no file of answers" in capsys.readouterr().err
    (tmp_path / "answers-attacks.jsonl").unlink()
    alone = run(capsys, *flags, "--answers_only")
    assert "ROUGE-L" in alone and "who said it" not in alone


def test_wrong_files_are_told_before_anything_slow(checkpoint, few_samples, tmp_path, capsys):
    (tmp_path / "attacks.jsonl").write_text('{"kind": 1}\n', encoding="utf-8")
    flags = ["--model_path", checkpoint, "--test_path", few_samples[1], "--output_path", tmp_path / "answers.jsonl"]
    flags += ["--attacks", tmp_path / "attacks.jsonl", "--plain_text", tmp_path / "none.txt"]
    with pytest.raises(SystemExit) as exit:
        run(capsys, *flags)
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
    out = run(capsys, "--model_path", checkpoint, "--test_path", test, "--output_path", tmp_path / "answers.jsonl")
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
    out = run(capsys, *flags, "--output_path", tmp_path / "answers.jsonl")
    (loss,) = (line for line in out.split("\n") if "loss with the role's own" in line)
    assert loss.split("|")[3].strip() == loss.split("|")[4].strip()  # the same weights, the same answers


def test_nothing_that_fits_makes_no_row(samples):
    questions = predict.read_questions(samples[1])
    said = read_personas(lambda samples: [np.empty(0)] * len(samples), predict.recorded_samples(questions))
    assert len(said.role) == 0 and persona_scores(said) == {}
