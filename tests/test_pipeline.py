"""The walk of the README on the sample: a stand-in learns its roles and answers, in a directory of any name."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    PUBLISHED,
    ROOT,
    ROOT_USER,
    SHARED,
    adapter_weights,
    output_of,
    scalars,
    users_environment,
)
from tools import taught

import data_helper
import merge_params
import predict
import train
import web_demo
from baichuan import BaichuanConfig, BaichuanForCausalLM
from support.errors import UserError
from support.model import stand_in
from support.model.directory import ModelDirectory
from support.model.server import Server
from support.page.speaker import Speaker
from support.training.checkpoints import checkpoints
from tests.forked import free_port


@pytest.fixture(scope="module")
def walk(samples, tmp_path_factory):
    """(stand-in, merged model), made with the flags of `make demo`."""
    directory = tmp_path_factory.mktemp("walk")
    base, merged = str(directory / "Baichuan2-tiny"), str(directory / "merged")
    stand_in.main(["--save_dir", base, "--train_path", samples[0]])
    lines = (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines()
    (command,) = [line for line in lines if "train.py --train_path" in line]
    flags = command.split("--output_dir")[1].split()[1:]  # after the paths: what decides the training
    paths = ["--train_path", samples[0], "--test_path", samples[1], "--output_dir", str(directory / "run")]
    train.main([*paths, "--model_name_or_path", base, *flags])
    (adapter,) = (path for _, path in checkpoints(directory / "run"))
    merge_params.main(["--ori_model_dir", base, "--model_dir", str(adapter), "--save_model_dir", merged])
    return base, merged


def test_the_demo_ends_with_one_question_and_fails_where_answers_are_not_the_taught_ones(walk, samples, capsys):
    stand_in, merged = walk
    ask = ["--train_path", samples[0], "--before", stand_in]
    assert not taught.main([*ask, "--after", merged])
    question, before, after, recorded = capsys.readouterr().out.splitlines()[:4]
    assert question.endswith("孙悟空：你的金箍棒有多重？")
    assert after.split()[-1] == recorded.split()[-1] != before.split()[-1]
    assert taught.main([*ask, "--after", stand_in]) == 1
    assert "error: 8 should be" in capsys.readouterr().err


@pytest.mark.slow
def test_later_questions_are_answered_from_the_history(tmp_path):
    """With what was said before, as recorded; without it the same question has another answer, or none."""
    sample, path = ROOT / "data/sample", str(tmp_path / "train.json")
    files = ["--conversations", sample / "conversations_train.jsonl", "--desc_path", sample / "profiles-zh_desc.json"]
    files += ["--test_conversations", sample / "conversations_test.jsonl"]
    paths = ["--train_path", path, "--test_path", str(tmp_path / "test.json")]
    data_helper.main([*map(str, files), *paths])
    base, run = str(tmp_path / "Baichuan2-tiny"), str(tmp_path / "run")
    stand_in.main(["--save_dir", base, "--train_path", path])
    steps = ["--num_train_epochs", "60", "--save_total_limit", "1", "--sample_answers", "0", "--lora_dropout", "0"]
    train.main([*paths, "--model_name_or_path", base, "--output_dir", run, "--learning_rate", "5e-3", *steps])
    merged = str(tmp_path / "merged")
    merge_params.main(["--ori_model_dir", base, "--model_dir", f"{run}/epoch-60-step-180", "--save_model_dir", merged])
    questions = taught.ten_questions(path, later=True)
    assert len(questions) == 10
    assert taught.how_many_are_close(taught.answers(merged, questions, history=True), questions) >= 8
    assert taught.how_many_are_close(taught.answers(merged, questions), questions) <= 3


@pytest.mark.slow
def test_llama_cpp_gives_the_answers_of_this_project(walk, samples, tmp_path):
    """Its own server on loopback, which serves the exported weights in float32, asked by predict.py --engine."""
    base, merged = walk
    export, answers = tmp_path / "llama", {}
    adapter = ["--ori_model_dir", base, "--model_dir", str(Path(merged).parent / "run/best")]
    merge_params.main([*adapter, "--save_model_dir", str(export), "--format", "llama"])
    served = [sys.executable, "tests/tools/llama_cpp.py", str(export), "--port", "0"]
    with subprocess.Popen(served, cwd=ROOT, stdout=subprocess.PIPE, text=True) as llama_cpp:
        try:
            url = llama_cpp.stdout.readline().strip()
            for name, who in ("theirs", ["--engine", url]), ("ours", ["--model_path", merged, "--answers_only"]):
                path = tmp_path / f"{name}.jsonl"
                files = ["--train_path", samples[0], "--test_path", samples[1]]
                predict.main([*who, *files, "--output_path", str(path), "--max_new_tokens", "64", "--resamples", "20"])
                answers[name] = sorted(
                    path.read_text(encoding="utf-8").splitlines()[1:]
                )  # the first line: the settings
            asked = [
                {"role": "system", "content": "你是孙悟空。"},
                {"role": "user", "content": "<reserved_107>你是谁？"},
            ]
            ours, theirs = Speaker.load(merged, None, torch.device("cpu")), Server(url).check()
            settings = {"do_sample": False, "seed": -1, "max_new_tokens": 4, "repetition_penalty": 1.0}
            *_, (begun, state) = theirs.stream(asked, settings)  # without the marker in the question
            plain = [asked[0], {"role": "user", "content": "你是谁？"}]
            assert (begun, state) == [*ours.stream(plain, settings)][-1] and state == "cut"
            more = settings | {"max_new_tokens": 60}
            assert [*theirs.stream(asked, more, begun=begun)][-1] == [*ours.stream(plain, more, begun=begun)][-1]
            long = [asked[0], *(2 * plain[1:] + [{"role": "assistant", "content": "字" * 3000}]) * 3, plain[1]]
            assert [*theirs.stream(long, more)][-1][0]  # without the oldest rounds
            with pytest.raises(UserError, match="exceeds the available context"):
                [*theirs.stream([asked[0], {"role": "user", "content": "字" * 5000}], more)]
        finally:  # also when it fails: what stays would be waited for
            llama_cpp.send_signal(signal.SIGINT)
    assert llama_cpp.returncode == 0
    assert answers["theirs"] == answers["ours"] and len(answers["ours"]) == 46


def test_the_page_answers_from_the_command_line(walk, capsys):
    asked = ["--ask", "你的金箍棒有多重？", "--role", "孙悟空", "--desc_path", "data/sample/profiles-zh_desc.json"]
    web_demo.main(["--model_path", walk[1], *asked])
    answer = capsys.readouterr().out
    assert "俺老孙" in answer and "一万三千五百斤" in answer


def test_the_stand_in_has_the_published_layout(walk):
    stand_in, _ = walk
    model, opened = BaichuanForCausalLM.from_pretrained(stand_in), ModelDirectory(stand_in)
    tokenizer, config = opened.tokenizer, opened.generation_config
    assert (config.user_token_id, config.assistant_token_id) == (195, 196)
    assert tokenizer.convert_ids_to_tokens([195, 196]) == ["<reserved_106>", "<reserved_107>"]
    assert 1_000_000 < model.num_parameters() < 3_000_000
    names = set(model.state_dict())
    assert {"model.layers.0.self_attn.W_pack.weight", "model.norm.weight", "lm_head.weight"} <= names


# The chapter's flags, as the README has them.
BOOK = ["--per_device_train_batch_size", 2, "--max_len", 512, "--max_src_len", 256, "--learning_rate", 1e-4]
BOOK += ["--weight_decay", 0.1, "--num_train_epochs", 1, "--gradient_accumulation_steps", 4, "--warmup_ratio", 0.03]
BOOK += ["--seed", 1234, "--show_loss_step", 1, "--lora_dim", 16, "--lora_alpha", 64, "--save_model_step", 4]
BOOK += ["--lora_dropout", 0.1, "--gradient_checkpointing", "--ds_file", "ds_zero2_no_offload.json", "--is_skip"]

# Python runs this at its start: it writes down each attempt to look a name up or to reach another machine.
WATCH_NETWORK = """
import sys

def watch(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in (None, "", "localhost", "::1", "0.0.0.0") and not str(host).startswith("127."):
        with open({log!r}, "a") as file:
            file.write(f"{{sys.argv[:1]}} {{event}} {{host}}\\n")

sys.addaudithook(watch)
"""


@pytest.fixture
def books_inputs(checkpoint, tmp_path):
    """(RoleBench's directory, a model's directory): the real files and the published tokenizer, where they are at hand."""
    if not (SHARED / "rolebench").is_dir():
        return ROOT / "data/sample", checkpoint
    model = tmp_path / "Baichuan2-7B-Chat"
    torch.manual_seed(0)
    config = BaichuanConfig(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)
    BaichuanForCausalLM(config).save_pretrained(model)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copy(PUBLISHED / name, model)
    configs = [json.loads((path / "config.json").read_text()) for path in (model, PUBLISHED)]
    for name in ("auto_map", "model_type", "vocab_size", "model_max_length"):
        assert configs[0][name] == configs[1][name]
    return SHARED / "rolebench", model


def test_the_books_commands_in_an_odd_place(books_inputs, tmp_path, monkeypatch, request):
    """Every script, as a user starts it: the README's lines, in a directory with spaces and Chinese characters, under a
    home that nothing can be written to. With the launcher it is the same training to the last bit as without.

    As root it has no network at all but the loopback; anywhere, no script tries to reach another machine.
    """
    data_dir, model = books_inputs
    place = tmp_path / "角色 扮演 (一)"
    home, log = tmp_path / "home", tmp_path / "network.log"
    for directory in (place, home, tmp_path / "site"):
        directory.mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(WATCH_NETWORK.format(log=str(log)), encoding="utf-8")
    model = shutil.copytree(model, place / "模型 7B")
    env = users_environment(HOME=str(home), PYTHONPATH=str(tmp_path / "site"), CUDA_VISIBLE_DEVICES="0", LOCAL_SIZE="1")
    for name in ("HF_HOME", "XDG_CACHE_HOME", "TORCH_HOME", "TRITON_CACHE_DIR"):
        env.pop(name, None)
    isolated = []
    if ROOT_USER and shutil.which("ip"):
        isolated = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "-"]
    train_path, test_path, merged = place / "train 训练.json", place / "test.json", place / "merged 合并"

    def run(*command):
        """A command that succeeds. On stderr it shows its progress, and nothing else."""
        command = [*isolated, *map(str, command)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        stray = [line for line in re.split("[\r\n]", done.stderr) if line.strip() and not re.search(r"%\||…", line)]
        assert (done.returncode, stray) == (0, [])

    try:
        if ROOT_USER:
            request.getfixturevalue("mount")(1 << 20, at=home)
            subprocess.run(["mount", "-o", "remount,ro", home], check=True)
        else:
            home.chmod(0o500)
        paths = ["--train_path", train_path, "--test_path", test_path]
        run("python3", "data_helper.py", "--data_dir", data_dir, *paths)
        train_lines, test_lines = (
            path.read_text(encoding="utf-8").splitlines(True) for path in (train_path, test_path)
        )
        train_path.write_text("".join(train_lines[:: len(train_lines) // 64][:64]), encoding="utf-8")
        test_path.write_text("".join(test_lines[:8]), encoding="utf-8")
        flags = [*paths, "--model_name_or_path", model, *BOOK, "--sample_answers", 1]
        launcher = [*isolated, "deepspeed", "--master_port", free_port()]
        printed = output_of([*launcher, "train.py", *flags, "--output_dir", place / "output dir"], env=env)
        dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
        assert f"8 steps of 8 samples, 8 an epoch; {str(dtype)[6:]} on 1 × cpu" in printed and "Warning" not in printed
        assert ("this device has no bfloat16; training in float32" in printed) == (dtype == torch.float32)
        adapter = place / "output dir/epoch-1-step-8"
        sources = ["--ori_model_dir", model, "--model_dir", adapter]
        run("python3", "merge_params.py", *sources, "--save_model_dir", merged)
        asked = ["--model_path", merged, "--test_path", test_path, "--output_path", place / "answers 回答.jsonl"]
        run("python3", "predict.py", *asked, "--max_new_tokens", 4, "--resamples", 1)
        page = [
            "web_demo.py",
            "--model_path",
            merged,
            "--desc_path",
            data_dir / "profiles-zh_desc.json",
            "--port",
            free_port(),
        ]
        page = list(map(str, [*isolated, "python3", *page]))
        with subprocess.Popen(page, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as serving:
            assert any("http://127.0.0.1" in line for line in serving.stdout)
            serving.terminate()
    finally:
        if not ROOT_USER:
            home.chmod(0o700)
    assert not log.exists(), log.read_text()
    assert not list(home.iterdir())

    train.main(list(map(str, [*flags, "--output_dir", tmp_path / "alone"])))
    assert [path.name for _, path in checkpoints(tmp_path / "alone")] == ["epoch-1-step-4", "epoch-1-step-8"]
    for _, path in checkpoints(tmp_path / "alone"):
        ours, theirs = adapter_weights(path), adapter_weights(place / "output dir" / path.name)
        assert {tensor.dtype for tensor in ours.values()} == {dtype}
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("train_loss", "grad_norm", "ppl"):
        assert scalars(tmp_path / "alone", name) == scalars(place / "output dir", name)
