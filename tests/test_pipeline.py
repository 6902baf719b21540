"""The walk of the README on the sample, script after script: a stand-in learns its roles and answers."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from rouge_chinese import Rouge

import merge_params
import train
import utils
from baichuan import BaichuanForCausalLM, tiny
from baichuan.loading import load_tokenizer
from data_helper import read_samples


@pytest.fixture(scope="module")
def walk(samples, tmp_path_factory):
    """(stand-in, merged model), made with the flags of `make demo`."""
    directory = tmp_path_factory.mktemp("walk")
    stand_in, merged = str(directory / "Baichuan2-tiny"), str(directory / "merged")
    tiny.main(["--save_dir", stand_in, "--data_dir", str(ROOT / "data/sample")])
    lines = (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines()
    (command,) = [line for line in lines if "train.py --train_path" in line]
    flags = command.split("--output_dir")[1].split()[1:]  # after the paths: what decides the training
    paths = ["--train_path", samples[0], "--test_path", samples[1], "--output_dir", str(directory / "run")]
    train.main([*paths, "--model_name_or_path", stand_in, *flags])
    (adapter,) = (path for _, path in utils.checkpoints(directory / "run"))
    merge_params.main(["--ori_model_dir", stand_in, "--model_dir", str(adapter), "--save_model_dir", merged])
    return stand_in, merged


def close_answers(directory, questions) -> int:
    """How many greedy answers have a ROUGE-L of at least 0.8, character by character, with the recorded one."""
    model, (tokenizer, config) = BaichuanForCausalLM.from_pretrained(directory), load_tokenizer(directory)
    config.update(do_sample=False, max_new_tokens=80)
    close = 0
    for sample in questions:
        messages = [{"role": "system", "content": sample["system"]}, {"role": "user", "content": sample["prompt"]}]
        answer = model.chat(tokenizer, messages, generation_config=config) or "。"
        score = Rouge(metrics=["rouge-l"]).get_scores(" ".join(answer), " ".join(sample["response"]))
        close += score[0]["rouge-l"]["f"] >= 0.8
    return close


def test_loss(directory, path) -> float:
    data = utils.RoleDataset(read_samples(path), *load_tokenizer(directory), 512, 256)
    rows = utils.Collator(data, "prefix", 2048, 2)(data.by_persona(torch.arange(len(data)).numpy()))
    return utils.evaluate(BaichuanForCausalLM.from_pretrained(directory).eval(), rows, "cpu", "sdpa")


test_loss.__test__ = False  # a function, not a test


def test_fine_tuning_teaches_the_answers(walk, samples):
    """Trained questions are answered as recorded, which the stand-in, who knows the sentences, cannot do."""
    stand_in, merged = walk
    every = list(read_samples(samples[0]))
    prompts = [(sample["role"], sample["prompt"]) for sample in every]
    single = [s for s in every if prompts.count((s["role"], s["prompt"])) == 1]
    questions = single[:: len(single) // 10][:10]
    assert close_answers(stand_in, questions) <= 3
    assert close_answers(merged, questions) >= 8


def test_loss_on_rephrased_questions_is_halved(walk, samples):
    stand_in, merged = walk
    assert test_loss(merged, samples[1]) <= test_loss(stand_in, samples[1]) / 2


def test_the_page_answers_from_the_command_line(walk):
    """`make demo CHECK=1` ends with this."""
    command = [sys.executable, "web_demo.py", "--model_path", walk[1], "--ask", "你的金箍棒有多重？", "--role", "孙悟空"]
    command += ["--desc_path", "data/sample/profiles-zh_desc.json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "俺老孙" in run.stdout and "一万三千五百斤" in run.stdout


def test_the_stand_in_has_the_published_layout(walk):
    stand_in, _ = walk
    model, (tokenizer, config) = BaichuanForCausalLM.from_pretrained(stand_in), load_tokenizer(stand_in)
    assert (config.user_token_id, config.assistant_token_id) == (195, 196)
    assert tokenizer.convert_ids_to_tokens([195, 196]) == ["<reserved_106>", "<reserved_107>"]
    assert 1_000_000 < model.num_parameters() < 3_000_000
    names = set(model.state_dict())
    assert {"model.layers.0.self_attn.W_pack.weight", "model.norm.weight", "lm_head.weight"} <= names
