"""What several test files use: a small random checkpoint under a real SentencePiece tokenizer, the real RoleBench files
where they are at hand, and adapters, samples and runs."""

import ctypes
import glob
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

# The tests are of what a CPU can show, on a machine with a GPU, too; tests/tools/gpu_check.py shows the rest.
if HAS_GPU := bool(glob.glob("/dev/nvidia[0-9]*")):
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")  # the launcher sets the former anew
os.environ["HF_HUB_OFFLINE"] = "1"  # no test but that of --download, which sets its own hub, may look for a network
os.environ.update(NO_PROXY="127.0.0.1,localhost", no_proxy="127.0.0.1,localhost")  # where the tests' servers are
os.environ.pop("ALL_PROXY", os.environ.pop("all_proxy", None))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests run at a time; threads that wait for each other's spin

ROOT = Path(__file__).parent.parent
NAMESPACES = ["unshare", "--mount", "--net", "true"]
# May mount disks and make network namespaces; root in a container often may not.
ROOT_USER = os.geteuid() == 0 and subprocess.run(NAMESPACES, capture_output=True).returncode == 0
SHARED = ROOT.parent / "shared"  # RoleBench and the published tokenizer, beside the checkout of those who have them
PUBLISHED = SHARED / "baichuan2-7b-chat"
TOKENIZERS = ["trained"] + (["published"] if PUBLISHED.is_dir() else [])
NO_CHROMIUM = "the page in a browser needs Chromium: apt-get install chromium fonts-noto-cjk, or "
NO_CHROMIUM += "python3 -m playwright install --with-deps chromium"


LONGEST = ["test_pipeline.py", "test_resume.py", "test_train.py", "test_errors.py", "test_page.py", "test_predict.py"]


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_terminal_summary(terminalreporter):
    """The last lines: which tests were not run, and why."""
    if not ROOT_USER:
        terminalreporter.write_line(
            "not run: tests of full disks and of two hosts; they need root, and its right to unshare"
        )
    skipped = terminalreporter.stats.get("skipped", [])
    for reason, number in Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped).items():
        terminalreporter.write_line(f"not run: {number} of the tests: {reason}")


@pytest.fixture(scope="session")
def checkpoint(samples, tmp_path_factory) -> str:
    """A directory in the published layout: random weights (hidden 64, 2 layers), tokenizer trained on the sample."""
    from support.model import stand_in

    directory = tmp_path_factory.mktemp("checkpoint") / "Baichuan2-random"
    sizes = ["--hidden_size", "64", "--num_hidden_layers", "2", "--vocab_size", "2000", "--steps", "0"]
    stand_in.main(["--save_dir", str(directory), "--train_path", samples[0], *sizes])
    return str(directory)


@pytest.fixture(scope="module")
def model(checkpoint):
    """The model of `checkpoint`, for tests that leave it as it is."""
    from baichuan import BaichuanForCausalLM

    return BaichuanForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="session")
def samples(tmp_path_factory) -> tuple[str, str]:
    """train.json and test.json of the sample's five roles."""
    import data_helper

    directory = tmp_path_factory.mktemp("samples")
    train, test = str(directory / "train.json"), str(directory / "test.json")
    sample = ["--data_dir", str(ROOT / "data/sample"), "--roles", "all"]
    data_helper.main([*sample, "--train_path", train, "--test_path", test])
    return train, test


@pytest.fixture(scope="session")
def few_samples(samples, tmp_path_factory) -> tuple[str, str]:
    """41 training and 5 test samples of all roles, for tests that need whole runs but not much training."""
    directory = tmp_path_factory.mktemp("few_samples")
    for path, every in ((samples[0], 5), (samples[1], 10)):
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        (directory / Path(path).name).write_text("".join(lines[::every]), encoding="utf-8")
    return str(directory / "train.json"), str(directory / "test.json")


@pytest.fixture(scope="session")
def own_mounts():
    """Give this process mounts of its own, which are gone when it and its children are, however they end."""
    new_mount_namespace = 0x00020000  # CLONE_NEWNS; os.unshare comes with Python 3.12
    if ctypes.CDLL(None, use_errno=True).unshare(new_mount_namespace):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


@pytest.fixture
def mount(own_mounts, tmp_path):
    """mount(size, at=None) → an empty disk of that many bytes, which other processes do not see; for root only."""
    disks = []

    def make(size: int, at: Path | None = None) -> Path:
        disk = at or tmp_path / f"disk-{len(disks)}"
        disk.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
        disks.append(disk)
        return disk

    yield make
    for disk in disks:
        subprocess.run(["umount", "-l", disk], check=True)


FLOAT32 = {
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    "gradient_clipping": 1.0,
}


@pytest.fixture(scope="session")
def float32_ds_file(tmp_path_factory) -> str:
    """The project's DeepSpeed configuration without half precision, for comparisons to many digits."""
    path = tmp_path_factory.mktemp("deepspeed") / "float32.json"
    path.write_text(json.dumps(FLOAT32))
    return str(path)


@pytest.fixture(scope="session")
def train_arguments(checkpoint, few_samples, float32_ds_file):
    """train_arguments(output_dir, "--flag", value, …) → argv: steps of 8 samples, 5 steps an epoch."""

    def arguments(output_dir, *more) -> list[str]:
        defaults = {
            **{"--model_name_or_path": checkpoint, "--train_path": few_samples[0], "--test_path": few_samples[1]},
            **{"--ds_file": float32_ds_file, "--output_dir": output_dir, "--show_loss_step": 1},
            **{"--lora_dropout": 0, "--learning_rate": 1e-3, "--max_len": 256, "--max_src_len": 128},
        }
        return [str(value) for pair in defaults.items() for value in pair] + [str(value) for value in more]

    return arguments


def scalars(output_dir, name: str) -> list[tuple[int, float]]:
    """(step, value) of a TensorBoard curve, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(output_dir) / "runs"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def adapter_weights(directory) -> dict:
    from safetensors.torch import load_file

    return load_file(Path(directory) / "adapter_model.safetensors")


def labelled(data, index):
    """A sample of one round as other trainers lay it out: ids with the eos, and as many labels."""
    import numpy as np
    import torch

    ids, pairs = data.sample(index)
    ids = torch.from_numpy(np.append(ids, [data.eos] * int(pairs[-1, 0] == len(ids) - 1)))
    labels = torch.full_like(ids, -100)
    labels[pairs[:, 0] + 1] = torch.from_numpy(pairs[:, 1])
    return ids, labels


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request, checkpoint):
    """The one of `checkpoint`, then the published one; a test file may have another of that name."""
    from baichuan import BaichuanTokenizer

    return BaichuanTokenizer.from_pretrained(PUBLISHED if request.param == "published" else checkpoint)


@pytest.fixture(scope="module")
def speaker(checkpoint):
    """What answers on the page: `checkpoint` without an adapter."""
    import torch

    from support.page.speaker import Speaker

    return Speaker.load(checkpoint, None, torch.device("cpu"))


# ---------------------------------------------------------------- adapters, and their merging

TARGETS = ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base, directory: Path, spread=0.1, **settings) -> Path:
    """An adapter of `base` whose random B makes it change every answer."""
    import torch
    from peft import LoraConfig, get_peft_model

    from baichuan import BaichuanForCausalLM

    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(BaichuanForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=spread)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def adapter(checkpoint, tmp_path_factory) -> Path:
    return make_adapter(checkpoint, tmp_path_factory.mktemp("adapter") / "epoch-1-step-3")


@pytest.fixture(scope="session")
def page_adapter(checkpoint, tmp_path_factory) -> str:
    """An adapter for the page that changes every answer: random, since a new one's B is zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    from support.model.directory import ModelDirectory

    directory, lora = tmp_path_factory.mktemp("adapter"), LoraConfig(target_modules=["W_pack", "o_proj"])
    torch.manual_seed(0)
    model = get_peft_model(ModelDirectory(checkpoint).load(torch.float32), lora)
    for parameter in (parameter for name, parameter in model.named_parameters() if "lora_B" in name):
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def merged(checkpoint, adapter, tmp_path_factory) -> Path:
    """`adapter` merged by the whole script."""
    return merge(checkpoint, adapter, tmp_path_factory.mktemp("merged") / "epoch-1-step-3-merge")


class ImpatientTimer:
    """In place of threading.Timer: its time is over at once."""

    def __init__(self, seconds, function, arguments, options):
        self.start = lambda: function(*arguments, **options)
        self.cancel = lambda: None


def merge(base, adapter, target, *more) -> Path:
    import merge_params

    flags = ["--ori_model_dir", base, "--model_dir", adapter, "--save_model_dir", target, *more]
    merge_params.main([str(flag) for flag in flags])
    return target


def refusal(capsys, base, adapter, target, *more) -> str:
    """Run a merge that must fail with error lines alone, and leave nothing beside what was there. Returns the lines."""
    before = sorted(target.parent.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        merge(base, adapter, target, *more)
    errors = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert exit.value.code == 2
    assert errors
    assert sorted(target.parent.rglob("*")) == before
    return "\n".join(errors)


# ---------------------------------------------------------------- samples

SYSTEM = {"role": "system", "content": "你是孙悟空。"}


def turns(*contents):
    """Contents of the user and the assistant in turn, as messages."""
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


TWO_ROUNDS = turns("你使什么兵器？", "金箍棒！", "那它是从哪儿得来的？", "东海龙宫！")


def conversation(system: str, *texts: str, silent=()) -> dict:
    """Turns of user and assistant in turn; those numbered in `silent` are not to be trained."""
    messages = turns(*texts)
    for number in silent:
        messages[number]["train"] = False
    return {"role": "", "system": system, "messages": messages}


CONVERSATIONS = [
    conversation("你是李白。", "你是谁？", "我乃李太白。", "那你爱酒吗？", "无酒不成诗。", "什么酒？", "新丰美酒。"),
    conversation(
        "你是李白。", "你是谁？", "我乃李太白。", "那你爱酒吗？", "爱。"
    ),  # another answer to the second question
    conversation("你是李白。", "你是谁？", "我乃李太白。", "你从哪里来？", "碎叶。", silent=[1]),  # another question
    conversation("你是李白。", "你是谁？", "我乃李太白。"),  # the beginning of the others, supervised once more
    conversation("你是李白。", "你是谁？", "我。"),
    conversation("你是孙悟空。", "你怕谁？", "师父念咒。", "为什么？", "头疼。"),
    conversation("", "无名？", "无名。", "真的？", "真的。"),
    {  # the page's download begins with the greeting
        "system": "你是张飞。",
        "messages": [
            {"role": "assistant", "content": "哈哈！", "train": False},
            *conversation("", "谁？", "俺！")["messages"],
        ],
    },
]


def said(role: str, system: str, question: str, answer: str) -> dict:
    return {"role": role, "system": system, "messages": turns(question, answer)}


PERSONAS = {"孙悟空": "你就是孙悟空。", "李白": "你是诗人李白，爱喝酒。", "张飞": "你叫张飞。"}
ROLE_SAMPLES = [
    said("孙悟空", PERSONAS["孙悟空"], "你是谁？", "俺老孙是也！"),
    said("孙悟空", PERSONAS["孙悟空"], "你是谁？", "齐天大圣！"),
    said("李白", PERSONAS["李白"], "你是谁？", "我乃李太白。"),
    said("李白", PERSONAS["李白"], "饮酒否？", "将进酒，杯莫停。"),
    said("张飞", PERSONAS["张飞"], "饮酒否？", "拿大碗来！"),
]


def one_by_one(model, tokenizer, sample) -> list[float]:
    """The log-probabilities of each supervised token, by a whole pass for each answer of a sample."""
    import torch

    from baichuan.generation_utils import messages_to_ids

    found, system = [], [{"role": "system", "content": sample["system"]}] if sample["system"] else []
    for number, turn in enumerate(sample["messages"]):
        if turn["role"] == "assistant" and turn.get("train", True):
            prompt = messages_to_ids(tokenizer, [*system, *sample["messages"][:number]])
            answer = [*tokenizer.text_to_ids(turn["content"]), tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            found += [logits[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]
    return found


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def as_written(sample):
    """A sample of one round that was read, as data_helper.py writes it."""
    question, answer = sample["messages"]
    assert question.keys() == answer.keys() == {"role", "content"}
    assert (question["role"], answer["role"]) == ("user", "assistant")
    rest = {key: text for key, text in sample.items() if key != "messages"}
    return {**rest, "prompt": question["content"], "response": answer["content"]}


# ---------------------------------------------------------------- models and runs

# Of a model that takes no time.
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}


def users_environment(**more) -> dict[str, str]:
    """This process's environment, without what this file and training in this process set."""
    ours = ("HF_HUB_OFFLINE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    ours += () if HAS_GPU else ("DS_ACCELERATOR",)
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more


def output_of(command, **options) -> str:
    """The output of a command, which has to succeed."""
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def pause_generation(monkeypatch, model, after: int) -> tuple[list, list[threading.Thread]]:
    """Let `model` generate `after` tokens, and no more before the stream has asked it to stop.

    Returns: two lists that grow while it generates: an entry for each token, and the threads that generated.
    """
    import torch

    generate, tokens, threads = model.generate, [], []

    def paused(*args, stopping_criteria, **kwargs):
        asked_to_stop = stopping_criteria[0]  # the stream's own

        def pause(ids, scores, **_):
            tokens.append(ids.shape[1])
            deadline = time.monotonic() + 60  # reached only if nobody asks
            while len(tokens) >= after and not asked_to_stop(ids, scores).all() and time.monotonic() < deadline:
                time.sleep(0.001)
            return torch.zeros(len(ids), dtype=torch.bool)

        threads.append(threading.current_thread())
        stopping_criteria.insert(0, pause)
        return generate(*args, stopping_criteria=stopping_criteria, **kwargs)

    monkeypatch.setattr(model, "generate", paused)
    return tokens, threads


def answers_of(path) -> dict[int, tuple]:
    """The lines of a file of answers, by the numbers of their questions."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[1:] if line]
    assert len({line["question"] for line in lines}) == len(lines)
    return {line["question"]: tuple(line.values()) for line in lines}
