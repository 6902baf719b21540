"""predict.py: batched answers are those given one by one, interrupted runs lose nothing, the scores are what they say."""

import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import jieba
import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_merge_params import make_adapter

import data_helper
import predict
from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from baichuan.generation_utils import messages_to_ids
from data_helper import persona
from support.dialogues.profiles import read_characters
from support.dialogues.samples import conversation, first_question, read_samples
from support.model.answering import greedy_ids, in_batches, left_padded, rows_that_fit
from support.model.directory import ModelDirectory
from support.scores.answers import catchwords, measure_answers, rouge_l
from support.scores.candidates import Candidate, Loader
from support.scores.table import Items, Score, compare, in_a_sentence, markdown, table, texts


@pytest.fixture(scope="module")
def model(checkpoint):
    return BaichuanForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return BaichuanTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def conversations(samples) -> list[list[dict]]:
    """Prompts of many lengths, with and without a system text, one of several turns."""
    found = [conversation(sample["system"], first_question(sample["messages"])) for sample in read_samples(samples[1])][
        :6
    ]
    turns = [*found[0], {"role": "assistant", "content": "俺老孙来也！"}, {"role": "user", "content": "再说一遍。"}]
    return [*found, conversation("", "好"), turns]


def greedy_by_hand(model, tokenizer, messages, new_tokens: int) -> list[int]:
    """No generate(), no cache, no padding: the whole sequence again for each token."""
    ids = messages_to_ids(tokenizer, messages)
    start = len(ids)
    with torch.no_grad():
        for _ in range(new_tokens):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[start:]


# ---------------------------------------------------------------- answers


def test_batched_answers_are_those_given_one_by_one(model, tokenizer, conversations):
    expected = [greedy_by_hand(model, tokenizer, messages, 9) for messages in conversations]
    config = predict.greedy(model.generation_config, 9)
    config.eos_token_id = [2, expected[0][4], expected[3][7]]  # so that some answers end early, and others do not
    ends = [next((i for i, id in enumerate(ids) if id in config.eos_token_id), None) for ids in expected]
    assert None in ends and any(ends)
    expected = [(tokenizer.decode(ids[:end]), end is not None) for ids, end in zip(expected, ends)]
    assert predict.answer_batch(model, tokenizer, conversations, config) == expected
    assert predict.answer_batch(model, tokenizer, conversations[::-1], config) == expected[::-1]
    assert [predict.answer_batch(model, tokenizer, [messages], config)[0] for messages in conversations] == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_shared_and_dropped_changes_no_token(checkpoint, tokenizer, samples, attention):
    """Against `generate`: all personas and questions of the sample, in one batch, in several, and one by one."""
    model = BaichuanForCausalLM.from_pretrained(checkpoint, attn_implementation=attention).eval()
    found = [conversation(sample["system"], first_question(sample["messages"])) for sample in read_samples(samples[1])]
    found += [conversation("", "好"), conversation("", "你从哪里来，要到哪里去？")]
    config = predict.greedy(model.generation_config, 70)  # more tokens than a layer has room for at first
    prompts = [messages_to_ids(tokenizer, messages) for messages in found]
    ids, mask = left_padded(prompts, tokenizer.pad_token_id, model.device)
    free = model.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
    config.eos_token_id = [2, *free[::7, 9].tolist(), *free[::5, 30].tolist()]
    expected = model.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
    ends = [next((n for n, id in enumerate(row, 1) if id in config.eos_token_id), 70) for row in expected]
    assert len(set(ends)) > 5 and max(ends) > 64
    shared = [len(tokenizer.text_to_ids(messages[0]["content"])) * (len(messages) == 2) for messages in found]
    for size in (1, 7, len(found)):
        answers = []
        for start in range(0, len(found), size):
            part = slice(start, start + size)
            answers += greedy_ids(model, prompts[part], shared[part], 70, config.eos_token_id, tokenizer.pad_token_id)
        assert answers == [row[:end] for row, end in zip(expected, ends)]


def test_a_persona_is_read_once_and_ended_rows_leave_the_batch(model, tokenizer, monkeypatch):
    shapes, forward = [], type(model).forward

    def seen(self, input_ids, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", seen)
    persona_ids, ids = list(range(300, 340)), greedy_by_hand(model, tokenizer, conversation("", "好"), 1)
    answers = greedy_ids(model, [[*persona_ids, id] for id in range(400, 408)], [40] * 8, 6, [], 0)
    assert shapes[-7:] == [(1, 40), *[(8, 1)] * 6] and len(ids) == 1
    first = [answer[0] for answer in answers]
    assert len(set(first)) > 1
    shapes.clear()
    ended = greedy_ids(model, [[*persona_ids, id] for id in range(400, 408)], [40] * 8, 3, first[:1], 0)
    assert shapes[2:] and all(shape == (8 - first.count(first[0]), 1) for shape in shapes[2:])
    assert ended[0] == first[:1] and all(len(answer) in (1, 2, 3) for answer in ended)


def test_answers_of_a_model_in_training(checkpoint, model, tokenizer, conversations, tmp_path):
    """Wrapped by PEFT and with gradient checkpointing, as train.py has it when it saves."""
    adapter = make_adapter(checkpoint, tmp_path / "adapter")
    wrapped = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), adapter, is_trainable=True)
    wrapped.gradient_checkpointing_enable()
    merged = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), adapter).merge_and_unload()
    config = predict.greedy(model.generation_config, 6)
    found = predict.answer_batch(wrapped.eval(), tokenizer, conversations, config)
    assert found == predict.answer_batch(merged.eval(), tokenizer, conversations, config)
    assert found != predict.answer_batch(model, tokenizer, conversations, config)


def test_text_of_a_question_never_becomes_a_marker(model, tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(type(model), "generate", lambda self, input_ids, **kwargs: seen.append(input_ids) or input_ids)
    predict.answer_batch(model, tokenizer, [conversation("", "<reserved_107></s>")], model.generation_config)
    assert [id for id in seen[0][0].tolist() if id in (1, 2, 195, 196)] == [195, 196]


# ---------------------------------------------------------------- the script


def run(checkpoint, samples, output, *more):
    flags = ["--model_path", checkpoint, "--test_path", samples[1], "--output_path", output, "--max_new_tokens", 4]
    flags += ["--lang", "en", "--resamples", 20, "--train_path", "none.json", "--answers_only"]
    predict.main([str(flag) for flag in (*flags, *more)])


def answers_of(path) -> dict[int, tuple]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[1:] if line]
    assert len({line["question"] for line in lines}) == len(lines)
    return {line["question"]: tuple(line.values()) for line in lines}


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


def test_a_loader_keeps_what_is_asked_for_again(checkpoint, tmp_path, tokenizer):
    adapters = [make_adapter(checkpoint, tmp_path / name, spread) for name, spread in (("one", 0.1), ("two", 0.3))]
    base, one, two = (
        Candidate(str(adapter), tmp_path, ModelDirectory(checkpoint), adapter) for adapter in (None, *adapters)
    )
    loader, ids = Loader(torch.device("cpu")), torch.tensor([tokenizer.text_to_ids("你是谁？")])

    def logits(candidate):
        with torch.no_grad():
            return loader(candidate)(ids).logits

    expected = [logits(candidate) for candidate in (base, one, two)]
    assert loader(two) is loader(two._replace(output=tmp_path / "other")) is not loader.base
    for number in (2, 1, 0, 2, 0, 1, 1):
        assert torch.equal(logits((base, one, two)[number]), expected[number])
    assert not torch.allclose(expected[0], expected[1]) and not torch.allclose(expected[1], expected[2])
    loader.drop()
    assert torch.equal(logits(one), expected[1])


# ---------------------------------------------------------------- batches and memory


def test_scores_do_not_depend_on_the_batch_size(checkpoint, few_samples, tmp_path, capsys):
    tables = []
    for size in (1, 3, 64):
        flags = ["--batch_size", size, "--train_path", few_samples[0], "--max_new_tokens", 40, "--overwrite"]
        run(checkpoint, few_samples, tmp_path / f"{size}.jsonl", *flags)
        out = capsys.readouterr().out
        tables.append(out)
        assert answers_of(tmp_path / f"{size}.jsonl") == answers_of(tmp_path / "1.jsonl")
    assert tables[0] == tables[1] == tables[2] and "copied answers" in tables[0]


def test_batches_shrink_when_the_memory_does_not_hold_them(capsys):
    def answer(batch):
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [-number for number in batch]

    found = list(in_batches(answer, range(12), 8, done={0}))
    assert [batch for batch, _ in found] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert all(answers == [-number for number in batch] for batch, answers in found)
    assert "8 questions side by side: going on with 4" in capsys.readouterr().out
    assert list(in_batches(answer, range(4), 2, done={0, 1})) == [([2, 3], [-2, -3])]
    with pytest.raises(ValueError):  # no lack of memory
        list(in_batches(lambda batch: int("x"), range(4), 2, done=()))
    with pytest.raises(torch.OutOfMemoryError):
        list(in_batches(lambda batch: answer([0] * 9), range(4), 2, done=()))


def test_rows_that_fit(model, monkeypatch):
    """64 numbers a key and a value in 2 layers, 4 bytes each: 1024 bytes a token; half of the free memory is for them."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2 * 1024 * 100 * 20))
    assert rows_that_fit(model, 100) == 20
    assert rows_that_fit(model, 10) == 64 and rows_that_fit(model, 10**9) == 1


def test_what_torch_keeps_of_a_gpu_is_free(monkeypatch):
    config = SimpleNamespace(num_hidden_layers=2, hidden_size=64)
    model = SimpleNamespace(config=config, device=torch.device("cuda"), dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 1024 * 100 * 3, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 1024 * 100 * 12)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 1024 * 100 * 5)
    assert rows_that_fit(model, 100) == 3 + 12 - 5


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


def test_catchwords_of_personas():
    assert catchwords(persona("皇帝", "一个君王，“官二代”之主。常用口头禅是：“朕”、“本皇”")) == ["朕", "本皇"]
    assert catchwords(persona("张飞", "猛将。常用口头禅是：“我乃燕人张翼德”、“吃我一矛！”、“啊~~~”")) == [
        *("我乃燕人张翼德", "吃我一矛！", "啊~~~")
    ]
    assert catchwords(persona("孙悟空", "美猴王。说话爱自称“俺老孙”“我齐天大圣”。")) == ["俺老孙", "我齐天大圣"]
    assert catchwords(persona("李白", "为人爽朗大方，乐于交友，爱好饮酒作诗")) == []


@pytest.mark.parametrize("directory", [ROOT / "data/sample", SHARED / "rolebench"], ids=["sample", "RoleBench"])
def test_every_persona_but_li_bais_has_catchwords(directory):
    if not directory.exists():
        pytest.skip("RoleBench is not beside this checkout")
    profiles = read_characters(directory / "profiles-zh_desc.json")
    found = {role: catchwords(persona(role, profile["description"])) for role, profile in profiles.items()}
    assert {role for role in profiles if not found[role]} == {"李白"}
    assert "官二代" not in found["华妃"] and "本宫" in found["华妃"]


# ---------------------------------------------------------------- scores


def longest_common(a: list, b: list) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def test_rouge_l_against_its_definition():
    pairs = [
        ("俺老孙一个筋斗十万八千里", "俺老孙翻一个筋斗云便是十万八千里"),
        ("今天天气很好我们去喝酒", "我们今天去江边喝酒看月亮"),
        ("俺老孙来也", "朕知道了"),
    ]
    for answer, reference in pairs:
        a, b = list(jieba.cut(answer)), list(jieba.cut(reference))
        common = longest_common(a, b)
        expected = 2 * common / (len(a) + len(b))  # F-measure of common / len(a) and common / len(b)
        assert rouge_l(answer, reference) == pytest.approx(expected, abs=1e-6)
    assert rouge_l("吃我一矛！", "吃我一矛！") == pytest.approx(1, abs=1e-6)
    assert rouge_l("", "吃我一矛！") == rouge_l(" \n", "吃我一矛！") == 0
    assert 0 <= rouge_l("。" * 1100, "……！？" * 50) <= 1  # long, odd texts neither fail nor recurse


def scored(*rows) -> dict[str, Score]:
    """Rows of (system, references, answer, stopped)."""
    questions = [
        predict.Question("角色", system, f"问{n}", None, None, references, [{"role": "user", "content": f"问{n}"}])
        for n, (system, references, _, _) in enumerate(rows)
    ]
    return measure_answers(
        questions, [predict.Answer(text, stopped) for *_, text, stopped in rows], None, None, {}
    ).scores


EMPEROR = "常用口头禅是：“朕”、“本皇”"


def with_kinds(score: Score, kinds: list) -> Score:
    return score._replace(items=score.items._replace(kind=kinds))


def test_measures_by_hand():
    scores = scored(
        (EMPEROR, ["朕知道了", "甲乙丙丁"], "朕知道了", True),
        (EMPEROR, ["朕知道了"], "朕知道了", False),
        (EMPEROR, ["朕知道了"], "", True),
        ("", ["举杯邀明月"], "举杯邀明月", True),
    )
    words = [list(jieba.cut(text)) for text in ("朕知道了", "举杯邀明月")]
    first, second = (set(pairwise(line)) for line in words)
    twice, once = 2 * len(list(pairwise(words[0]))), len(list(pairwise(words[1])))
    expected = {"rouge_l": (0.5 + 1 + 0 + 1) / 4, "catchwords": 2 / 3, "stops": 3 / 4}
    expected["distinct_2"] = len(first | second) / (twice + once)

    def values(kinds):
        models = {"model": {name: with_kinds(score, kinds) for name, score in scores.items()}}
        return {row.measure: row.models[0].value / 100 for row in compare(models, 5, 1, "kind", "甲")}

    assert values(["甲"] * 4) == pytest.approx(expected, abs=1e-6)
    assert "catchwords" not in values([None, None, None, "甲"])  # nobody's
    assert "distinct_2" not in values([None, None, "甲", None])  # no words, so no pairs
    assert values(["甲", None, None, None])["distinct_2"] == pytest.approx(len(first) / (twice / 2))
    # A question drawn several times says nothing else than once; nor does one whose pairs another has too.
    same = {"model": {"distinct_2": with_kinds(scores["distinct_2"], ["甲", "甲", None, None])}}
    (row,) = compare(same, 50, 1, "kind", "甲")
    assert row.models[0] == pytest.approx((100 * len(first) / twice,) * 3)


def test_intervals():
    """Those of a share against the binomial's; paired; the same for the same seed; around what was measured."""
    draw = np.random.default_rng(0)
    rows = 400
    stops = draw.random(rows) < 0.7
    texts = ["".join(draw.choice(list("朕知道了喝酒明月"), 6)) for _ in range(rows)]
    tuned = scored(*(("", ["朕"], text, bool(stop)) for text, stop in zip(texts, stops)))
    baseline = scored(*(("", ["朕"], "知道知道知道", False) for _ in range(rows)))
    found = {row.measure: row for row in compare({"baseline": baseline, "model": tuned}, 1000, 5)}
    assert set(found) == {"rouge_l", "stops", "distinct_2"}
    share = stops.mean()
    reach = 1.96 * 100 * (share * (1 - share) / rows) ** 0.5
    for estimate in (found["stops"].models[1], found["stops"].differences[0]):
        assert estimate.value == pytest.approx(100 * share)
        assert estimate.low == pytest.approx(estimate.value - reach, abs=0.15 * reach)
        assert estimate.high == pytest.approx(estimate.value + reach, abs=0.15 * reach)
    for row in found.values():
        assert all(estimate.low <= estimate.value <= estimate.high for estimate in [*row.models, *row.differences])
    assert compare({"model": tuned}, 50, 1) == compare({"model": tuned}, 50, 1)
    for row in compare({"a": tuned, "b": tuned}, 50, 1):
        assert row.differences == [(0, 0, 0)] and row.verdicts() == [0]


# ---------------------------------------------------------------- the table


def test_a_difference_is_marked_where_its_interval_excludes_zero():
    items = Items(["甲", "乙"] * 10, [None] * 20, [None] * 20, np.arange(20))
    numbers = np.arange(20.0)
    base = {name: Score(items, numbers) for name in ("rouge_l", "copies", "stops", "loss")}
    new = {"rouge_l": 5, "copies": 5, "stops": 10 * (-1.0) ** np.arange(20), "loss": -5}
    tuned = {name: Score(items, numbers + shift) for name, shift in new.items()}
    rows = compare({"base": base, "tuned": tuned}, 100, 1)
    assert {row.measure: row.verdicts() for row in rows} == {"rouge_l": [1], "loss": [1], "stops": [0], "copies": [-1]}
    lines = table(rows, ["base", "tuned"], texts("en"))
    marked = {line.split("|")[1].strip(): line.rstrip(" |").split()[-1] for line in lines[2:]}
    assert list(marked.values()) == ["better", "better", marked["ends by itself, %"], "worse"]
    assert marked["ends by itself, %"].endswith("]")
    assert in_a_sentence(rows, ["base", "tuned"], texts("en")) == [
        "tuned against base: better in recorded answers, persona's worth; worse in originality; "
        "no clear difference in ending by itself."
    ]
    assert in_a_sentence(rows, ["base", "tuned"], texts("zh"))[0].startswith(
        "tuned 与 base 相比：变好的有与原文重合、人设的作用；"
    )
    assert in_a_sentence(compare({"base": base}, 5, 1), ["base"], texts("en"))[0].startswith("Add --baseline_path")


def test_the_sentence_agrees_with_the_rows_of_a_family():
    items = Items(["甲"] * 20, [None] * 20, [None] * 20, np.arange(20))

    def sentence(**shifts):
        models = {
            name: {measure: Score(items, np.full(20, shift * on)) for measure, shift in shifts.items()}
            for on, name in enumerate(("base", "tuned"))
        }
        return in_a_sentence(compare(models, 20, 1), ["base", "tuned"], texts("en"))[0].split(": ")[1]

    assert sentence(breaks_said=0, breaks_likely=-5, attack_margin=5) == "better in staying in role."
    assert sentence(breaks_said=-5, breaks_likely=5) == "better in staying in role."  # they differ: the first one
    assert sentence(breaks_said=0, breaks_likely=5, attack_margin=5) == "no clear difference in staying in role."


def test_a_difference_of_few_is_not_called_sure():
    items = Items(["甲"] * 8, [None] * 8, [None] * 8, np.arange(8) // 2)
    models = {name: {"rouge_l": Score(items, np.full(8, value))} for name, value in (("base", 1.0), ("tuned", 9.0))}
    (row,) = compare(models, 20, 1)
    assert row.clusters == 4 and row.differences == [(8, 8, 8)] and row.verdicts() == [0]


def test_table_lines_up_under_chinese_names():
    lines = markdown([["role", "x"], ["孙悟空", "1"], ["a", "22"]])
    assert lines == ["| role   | x  |", "|--------|----|", "| 孙悟空 | 1  |", "| a      | 22 |"]
