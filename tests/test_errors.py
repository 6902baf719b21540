"""Errors are lines and a status, and no output is partial: of some hundred damaged inputs, drawn with a seed.

Each draw damages one file of a set that works, or the command line, and calls a script's main. Whatever was wrong, the
output is whole, or exit status 2 and a line for each problem: no traceback, no partial output and nothing left behind.
"""

import copy
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from conftest import FLOAT32, ROOT, ROOT_USER, adapter_weights
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import data_helper
import merge_params
import predict
import train
import utils
import web_demo
from baichuan import BaichuanForCausalLM
from support.dialogues.samples import read_samples
from support.errors import OneProcessError, UserError, entry_point
from support.model import stand_in
from support.training.resume import checkpoints
from tests.forked import run_to_the_end

SCRIPTS = {
    "data_helper.py": data_helper,
    "train.py": train,
    "merge_params.py": merge_params,
    "predict.py": predict,
    "web_demo.py": web_demo,
    "support.model.stand_in": stand_in,
}
SAMPLE = ROOT / "data/sample"
SECONDS = 60  # of computing for a call, whatever else the machine does; most take less than one
MEMORY = 6 << 30  # bytes that this process may take: a damaged size must be noticed before it is allocated

# ---------------------------------------------------------------- damage

# fmt: off
ODD_VALUES = [None, True, False, -1, 0, 1, 2.5, -0.5, math.nan, 2**31, [], {}, [[]], [None], ["x", 1], {"": None},
              {"a": {"b": [1]}}, "", " ", "x", "孙悟空", "../..", "auto", "relu", "<reserved_106>"]
JUNK = ["", " ", "-1", "0", "1", "2.5", "1e999", "nan", "inf", "9" * 30, "x", "x" * 300, "孙悟空", "--", "-h2", "/", ".",
        "~", "*", "%s", "a\nb", "/dev/null", "/nowhere/x", "auto", "cpu", "cuda:0", "none", "all"]
# fmt: on


def places(value, path=()):
    """The paths to all values in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def damaged_json(text: str, draw: random.Random) -> str:
    """One value replaced, removed, doubled or renamed."""
    value = json.loads(text)
    *parents, last = draw.choice([path for path in places(value) if path] or [("x",)])
    holder = value
    for key in parents:
        holder = holder[key]
    act = draw.choice(["replace", "replace", "replace", "remove", "rename", "top"])
    if act == "top":
        value = draw.choice(ODD_VALUES)
    elif act == "remove":
        del holder[last]
    elif act == "rename" and isinstance(holder, dict):
        holder[str(last) + draw.choice(["_", " ", "2"])] = holder.pop(last)
    else:
        holder[last] = copy.deepcopy(draw.choice(ODD_VALUES))
    return json.dumps(value, ensure_ascii=draw.random() < 0.5)


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """A bit turned, a part cut out, doubled, overwritten or added."""
    start = draw.randrange(len(data) + 1)
    end = min(len(data), start + draw.choice([1, 2, 10, 1000]))
    act = draw.choice(["bit", "cut", "double", "overwrite", "insert", "end", "beginning", "empty"])
    if act == "bit" and data:
        place = min(start, len(data) - 1)
        return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
    return {
        "cut": data[:start] + data[end:],
        "double": data[:end] + data[start:],
        "overwrite": data[:start] + draw.randbytes(end - start) + data[end:],
        "insert": data[:start]
        + draw.choice([b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"{", b'"'])
        + data[start:],
        "end": data[:start],
        "beginning": data[start:],
    }.get(act, b"")


def damage(path: Path, draw: random.Random):
    """Damage a file in its place: as JSON, as one line of JSON lines, or as bytes; or make it something else."""
    data = path.read_bytes()
    lines_of_json = path.suffix == ".jsonl" or (path.suffix == ".json" and b"\n{" in data)
    if draw.random() < 0.04:
        path.unlink()
        if draw.random() < 0.5:
            path.mkdir()
    elif path.suffix == ".json" and not lines_of_json and draw.random() < 0.7:
        path.write_bytes(damaged_json(data.decode(), draw).encode("utf-8", "surrogatepass"))
    elif lines_of_json and draw.random() < 0.7:
        lines = data.decode().splitlines()
        number = draw.randrange(len(lines))
        lines[number] = damaged_json(lines[number], draw)
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(damaged_bytes(data, draw))


def damaged_command(argv: list[str], draw: random.Random) -> list[str]:
    """A value replaced, a word left out, doubled, moved or added."""
    argv = list(argv)
    place = draw.randrange(len(argv))
    act = draw.choice(["value", "value", "value", "remove", "double", "swap", "add"])
    if act == "value":
        values = [i for i, word in enumerate(argv) if not word.startswith("--")]
        argv[draw.choice(values)] = draw.choice(JUNK)
    elif act == "remove":
        del argv[place]
    elif act == "double":
        argv.insert(place, argv[place])
    elif act == "swap":
        other = draw.randrange(len(argv))
        argv[place], argv[other] = argv[other], argv[place]
    else:
        argv.insert(place, draw.choice([*JUNK, "--resume", "--overwrite", "--no_such_flag", "--seed", "--roles"]))
    return argv


# ---------------------------------------------------------------- what may come of it


def files_in(directory: Path) -> dict[str, tuple]:
    """All but what a run notes down when it begins (it may find out later that a weight is no number, say), and but for
    the answers so far, from which predict.py goes on."""
    found = {path: path.lstat() for path in directory.rglob("*")}
    notes = ("run/runs/", "run/train_args.json", "run/.lock")
    return {
        str(path): (stat.st_size, stat.st_mtime_ns)
        for path, stat in found.items()
        if not (path.is_dir() or path.suffix == ".part" or str(path.relative_to(directory)).startswith(notes))
    }


class Run:
    """Calls a script's main and judges what became of it. Counts what it saw, and collects what should not be."""

    def __init__(self, capfd):
        self.capfd, self.succeeded, self.refused, self.failures = capfd, 0, 0, []

    def __call__(self, script: str, argv: list[str], outputs: Path, whole) -> None:
        """outputs: all that the script writes goes there; whole(script, outputs): asserts that it is complete."""
        try:
            self.judge(script, argv, outputs, whole)
        except AssertionError as failure:
            self.failures.append(str(failure))

    def judge(self, script, argv, outputs, whole):
        before, case = files_in(outputs), f"{script} {argv}"
        status = 0
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            SCRIPTS[script].main(argv)
        except SystemExit as error:
            status = error.code
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise AssertionError(f"{case}: ended in {error!r}, {where.filename}:{where.lineno}") from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        printed = "".join(self.capfd.readouterr())
        assert "Traceback (most recent" not in printed, f"{case}:\n{printed}"
        if status == 0:
            self.succeeded += 1
            if "--help" not in argv and "-h" not in argv:
                whole(script, outputs)
            return
        self.refused += 1
        assert status == 2, f"{case}: status {status}\n{printed}"
        lines = [line for line in re.split(r"[\n\r]", printed) if line.startswith("error: ")]
        assert lines, f"{case}: says nothing\n{printed}"
        assert all(len(line) > len("error: ") + 5 for line in lines), lines
        assert files_in(outputs) == before, f"{case}: left something behind"


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Calls go on in a directory of their own, where a wrong flag may write. Yields a `Run`; files are in `tmp_path`."""

    def too_long(*_):
        raise TimeoutError(f"no end after {SECONDS} seconds of computing")

    monkeypatch.chdir(tmp_path)
    watched, before = Run(capfd), signal.signal(signal.SIGPROF, too_long)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, limits[1]))
    yield watched
    resource.setrlimit(resource.RLIMIT_DATA, limits)
    signal.signal(signal.SIGPROF, before)
    assert not watched.failures, "\n".join([f"{len(watched.failures)} failures", *watched.failures])


@pytest.fixture(scope="module")
def small(samples, tmp_path_factory) -> Path:
    """A working set of everything, small enough that a step takes no time: model, adapters, samples, RoleBench files."""
    place = tmp_path_factory.mktemp("small")
    sizes = ["--hidden_size", "32", "--num_hidden_layers", "1", "--vocab_size", "2000", "--steps", "0"]
    stand_in.main(["--save_dir", str(place / "model"), "--train_path", samples[0], *sizes])
    shutil.copy(samples[0], place / "sentences.json")
    config = json.loads((place / "model/generation_config.json").read_text())
    (place / "model/generation_config.json").write_text(json.dumps(config | {"max_new_tokens": 2}))

    model = BaichuanForCausalLM.from_pretrained(place / "model")
    lora = get_peft_model(
        model, LoraConfig(r=2, target_modules=utils.find_all_linear_names(model), task_type="CAUSAL_LM")
    )
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lora.save_pretrained(place / "adapter", save_embedding_layers=False)
    shutil.copytree(place / "adapter", place / "adapter-bin")
    weights = place / "adapter-bin/adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    shutil.copytree(place / "model", place / "model-bin")
    weights = place / "model-bin/model.safetensors"
    torch.save(load_file(weights), place / "model-bin/pytorch_model.bin")
    weights.unlink()

    sources = ["--ori_model_dir", str(place / "model"), "--model_dir", str(place / "adapter"), "--probes", "1"]
    merge_params.main([*sources, "--save_model_dir", str(place / "merged-llama"), "--format", "llama"])

    (place / "rolebench").mkdir()
    for source in SAMPLE.glob("*.json*"):
        shutil.copy(source, place / "rolebench")
    two = [
        {"role": "孙悟空", "system": "你是孙悟空。", "prompt": "你是谁？", "response": "俺老孙是也！"},
        {"role": "李白", "system": "你是李白。", "prompt": "饮酒否？", "response": "将进酒，杯莫停。"},
    ]
    for name in ("train.json", "test.json"):
        (place / name).write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in two), encoding="utf-8")
    # Without torch_adam, whose false would have DeepSpeed compile an Adam of its own for minutes.
    optimizer = {"type": "AdamW", "params": {"betas": [0.9, 0.95], "eps": 1e-8}}
    (place / "ds.json").write_text(json.dumps(FLOAT32 | {"bf16": {"enabled": False}, "optimizer": optimizer}))

    train.main(RESUME[2].format(*[place] * 9).split())
    state = place / "begun/run/state/epoch-2-step-2"
    state.rename(state.with_name("epoch-1-step-1"))  # so that something is left to do
    return place


# Each: (script, files that are damaged, arguments, a check of what it has written); {} is the directory of a copy of `small`.
DATA = ("data_helper.py", "rolebench/*", "--data_dir {}/rolebench --roles all --train_path {}/out/train.json "
        "--test_path {}/out/test.json")  # fmt: skip
TRAIN = ("train.py", "model/*.json model/tokenizer.model model/model.safetensors train.json test.json ds.json",
         "--model_name_or_path {}/model --train_path {}/train.json --test_path {}/test.json --ds_file {}/ds.json "
         "--output_dir {}/out/run --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --lora_dim 2 "
         "--show_loss_step 1 --sample_answers 1")  # fmt: skip
RESUME = ("train.py", "begun/run/state/*/*", TRAIN[2].replace("/out/", "/begun/") + " --num_train_epochs 2 --resume")
MERGE = ("merge_params.py", "adapter/adapter_* model/*.json model/tokenizer.model model/model.safetensors",
         "--ori_model_dir {}/model --model_dir {}/adapter --save_model_dir {}/out/merged --probes 1")  # fmt: skip
MERGE_BIN = ("merge_params.py", "adapter-bin/adapter_model.bin model-bin/pytorch_model.bin",
             "--ori_model_dir {}/model-bin --model_dir {}/adapter-bin --save_model_dir {}/out/merged --probes 1")  # fmt: skip
CHECK = ("merge_params.py", "merged-llama/*.json merged-llama/model.safetensors", MERGE[2].replace("out/merged", "merged-llama")
         + " --check_only")  # fmt: skip
PREDICT = ("predict.py", "test.json model/*.json model/tokenizer.model",
           "--model_path {}/model --test_path {}/test.json --output_path {}/out/answers.jsonl --max_new_tokens 2 "
           "--resamples 2 --answers_only")  # fmt: skip
ASK = ("web_demo.py", "rolebench/profiles* adapter/adapter_* model/*.json model/tokenizer.model",
       "--model_path {}/model --adapter_path {}/adapter --desc_path {}/rolebench/profiles-zh_desc.json --ask 你是谁？")  # fmt: skip
STAND_IN = ("support.model.stand_in", "sentences.json", "--save_dir {}/out/stand-in --train_path {}/sentences.json --hidden_size 32 --steps 0 "
        "--num_hidden_layers 1 --vocab_size 2000")  # fmt: skip


def assert_whole(script: str, out: Path):
    """What a script that succeeded has written can be read, and nothing temporary is beside it."""
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    if script == "data_helper.py":
        for path in out.glob("*.json"):
            assert list(read_samples(path))
    for _, adapter in checkpoints(out / "run"):
        assert all(tensor.isfinite().all() for tensor in adapter_weights(adapter).values())
        assert checkpoints(out / "run/state")
    for model in (out / "merged", out / "stand-in"):
        if model.exists():
            assert load_file(model / "model.safetensors") and (model / "tokenizer.model").exists()
            json.loads((model / "config.json").read_text(encoding="utf-8"))
    for answers in out.glob("answers*.jsonl"):
        assert all(map(json.loads, answers.read_text(encoding="utf-8").splitlines()))


def fresh(small: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(small, place)
    (place / "out").mkdir()
    return place


# Every fourth draw; all of them in minutes.
EVERY = pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])


@EVERY
@pytest.mark.parametrize(
    "case, count",
    [(DATA, 300), (TRAIN, 120), (RESUME, 40), (MERGE, 120), (MERGE_BIN, 60), (CHECK, 60), (PREDICT, 60), (ASK, 80), (STAND_IN, 20)],
    ids=["data_helper", "train", "resume", "merge", "merge-bin", "check", "predict", "web_demo", "tiny"],
)  # fmt: skip
def test_damaged_files(small, run, tmp_path, case, count, every):
    script, files, arguments = case
    for seed in range(0, count, every):
        draw, place = random.Random(f"{script} {seed}"), fresh(small, tmp_path / f"set-{seed}")
        damaged = draw.choice(sorted(path for pattern in files.split() for path in place.glob(pattern)))
        damage(damaged, draw)
        outputs = place / ("begun" if "/begun/" in arguments else "out")
        run(script, arguments.format(*[place] * 9).split(), outputs, assert_whole)
        shutil.rmtree(place)
    assert run.refused > count / every / 4, "the damage has to be seen"


@EVERY
@pytest.mark.parametrize(
    "case, count",
    [(DATA, 60), (TRAIN, 80), (MERGE, 40), (PREDICT, 40), (ASK, 40), (STAND_IN, 20)],
    ids=["data_helper", "train", "merge", "predict", "web_demo", "tiny"],
)
def test_damaged_command_lines(small, run, tmp_path, case, count, every):
    script, _, arguments = case
    for seed in range(0, count, every):
        draw, place = random.Random(f"{script} {seed}"), fresh(small, tmp_path / f"set-{seed}")
        argv = damaged_command(arguments.format(*[place] * 9).split(), draw)
        run(script, argv, place / "out", lambda script, out: None)
        shutil.rmtree(place)
    assert run.refused > count / every / 4


@pytest.mark.parametrize("case", [TRAIN, MERGE, PREDICT, ASK], ids=lambda case: case[0])
@pytest.mark.parametrize("of_another", [{"num_hidden_layers": 1000}, {"max_position_embeddings": None}], ids=str)
def test_every_script_refuses_a_config_of_another_model(small, run, tmp_path, case, of_another):
    """Before its size fills the memory; and Baichuan 13B, which has no rotary positions, so that config.json names none."""
    place = fresh(small, tmp_path / "set")
    config = json.loads((place / "model/config.json").read_text()) | of_another
    config = {name: value for name, value in config.items() if name not in of_another or value is not None}
    (place / "model/config.json").write_text(json.dumps(config))
    script, _, arguments = case
    run(script, arguments.format(*[place] * 9).split(), place / "out", lambda *_: pytest.fail("was accepted"))
    assert run.refused == 1


if ROOT_USER:
    LLAMA = (*MERGE[:2], MERGE[2] + " --format llama")
    DISKS = {"data": DATA, "merge": MERGE, "llama": LLAMA, "predict": PREDICT, "tiny": STAND_IN}

    @pytest.mark.parametrize("case", DISKS)
    def test_a_full_disk_is_one_line_and_leaves_nothing(small, run, mount, tmp_path, case):
        place = fresh(small, tmp_path / "set")
        script, _, arguments = DISKS[case]
        arguments = arguments.format(*[place] * 9).split()
        disk = mount({"predict": 4, "data": 16}.get(case, 100) * 1024, at=place / "out")
        (disk / "ballast").write_bytes(bytes(4096))
        run(script, arguments, disk, lambda *_: pytest.fail("has no room"))
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        run(script, arguments, disk, assert_whole)
        assert (run.refused, run.succeeded) == (1, 1)


COMMANDS = [
    ["data_helper.py", "--train_path", "/dev/null/x", "--data_dir", "data/sample"],
    ["data_helper.py", "--data_dir", "nowhere"],
    ["train.py"],
    ["train.py", "--ds_file", "LICENSE", "--train_path", "images/6_1.png"],
    ["train.py", "--output_dir", "LICENSE/run"],
    ["merge_params.py", "--ori_model_dir", "x", "--model_dir", "data", "--save_model_dir", "images"],
    ["merge_params.py", "--ori_model_dir", "x", "--model_dir", "x", "--save_model_dir", "y", "--device", "99"],
    ["predict.py", "--model_path", "data", "--test_path", "LICENSE"],
    ["web_demo.py", "--port", "99999", "--desc_path", "LICENSE"],
    ["web_demo.py", "--model_path", "nowhere"],
    ["-m", "support.model.stand_in", "--save_dir", "images"],
    ["-m", "support.model.stand_in", "--steps", "x"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_wrong_commands(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *arguments = [word for word in command if word != "-m"]
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[script].main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and lines and all(line.startswith("error: ") for line in lines), lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_command_as_a_user_starts_it(script):
    """The last of COMMANDS, in a process of its own, with what its imports print."""
    *_, command = [command for command in COMMANDS if script in command]
    if command[0] == "-m":
        command = [f"{script.replace('.', '/')}.py", *command[2:]]
    statuses, printed = run_to_the_end(*command)
    assert statuses == [2], printed
    assert printed and all(line.startswith("error: ") for line in printed.splitlines())


# ---------------------------------------------------------------- numbers that go wrong


def train_arguments_of(place: Path, *more) -> list[str]:
    return [*TRAIN[2].format(*[place] * 9).split(), "--sample_answers", "0", *map(str, more)]


def error_line(arguments, capfd) -> str:
    with pytest.raises(SystemExit) as ended:
        train.main(arguments)
    assert ended.value.code == 2
    (line,) = re.findall("error: .*", capfd.readouterr().err)
    return line


def test_weights_that_are_no_numbers_stop_the_run_with_step_and_samples(small, tmp_path, capfd):
    place = fresh(small, tmp_path / "set")
    weights = load_file(place / "model/model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = math.inf
    save_file(weights, place / "model/model.safetensors", metadata={"format": "pt"})
    line = error_line(train_arguments_of(place), capfd)
    assert re.search(
        r"train.json: the loss of step 1 is (nan|inf), its gradient's norm nan, with samples [12], [12]; ", line
    )
    assert "No state is the last one saved" in line
    assert not checkpoints(place / "out/run") and not checkpoints(place / "out/run/state")


def test_a_diverging_run_stops_and_keeps_the_last_good_state(small, tmp_path, capfd, monkeypatch):
    """The gradient of step 3 is made infinite after a state of step 2 was saved; the loss itself is still finite."""
    place, update = fresh(small, tmp_path / "set"), train.update

    def overflowing(engine, dtype, numbers):
        if engine.global_steps == 2:
            for gradients in engine.optimizer.averaged_gradients.values():
                gradients[0].fill_(math.inf)
        return update(engine, dtype, numbers)

    monkeypatch.setattr(train, "update", overflowing)
    flags = ["--num_train_epochs", 4, "--save_model_step", 1]
    line = error_line(train_arguments_of(place, *flags), capfd)
    state = place / "out/run/state/epoch-2-step-2"
    assert (
        re.search(r"the loss of step 3 is [\d.]+, its gradient's norm nan, with samples", line)
        and f"{state} is the last one saved" in line
    )
    assert [path.name for _, path in checkpoints(place / "out/run")] == ["epoch-1-step-1", "epoch-2-step-2"]
    monkeypatch.undo()
    train.main(train_arguments_of(place, *flags, "--resume"))  # what was kept is good
    train.main([*train_arguments_of(fresh(small, tmp_path / "other"), *flags)])
    ours, theirs = (adapter_weights(tmp_path / name / "out/run/epoch-4-step-4") for name in ("set", "other"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_huge_learning_rate_is_not_saved(small, tmp_path, capfd):
    """The first update ruins the adapters: the test loss of what would be saved tells, before it is."""
    place = fresh(small, tmp_path / "set")
    line = error_line(train_arguments_of(place, "--learning_rate", 1e30, "--num_train_epochs", 3), capfd)
    assert "test.json: the loss after step 1 is nan" in line or "the loss of step 2 is" in line
    assert not checkpoints(place / "out/run")


# ---------------------------------------------------------------- errors as lines


@pytest.mark.parametrize(
    "raised, code, lines",
    [
        (UserError("a: one", "b: two\nlines"), 2, ["error: a: one", "error: b: two lines"]),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, ["error: x: No such file or directory"]),
        (KeyboardInterrupt(), 130, []),
    ],
)
def test_errors_are_lines_and_a_status(capsys, raised, code, lines):
    @entry_point
    def main(argv):
        raise raised

    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == code
    assert capsys.readouterr().err.splitlines() == lines


def test_a_script_outlives_who_reads_it(tmp_path):
    """Both of its streams are a pipe that nobody reads any more; with a full disk that is an error, as ever."""
    source = "from support.errors import entry_point\n@entry_point\ndef main(argv):\n    for _ in range(99): print('x' * 9000)\n"
    source += "    print('y', file=__import__('sys').stderr, flush=True)\n    open(argv, 'w').write('done')\nmain({!r})"
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", source.format(str(tmp_path / "end"))]
    assert subprocess.run(command, cwd=ROOT, stdout=writing, stderr=writing).returncode == 0
    os.close(writing)
    assert (tmp_path / "end").read_text() == "done"
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: No space left on device")


def test_a_defect_keeps_its_traceback():
    @entry_point
    def main(argv):
        raise AssertionError("a defect of the program")

    with pytest.raises(AssertionError):
        main([])


@pytest.mark.parametrize(
    "error, told",
    [
        (UserError("a wrong flag"), False),
        (OneProcessError("a full disk of one host"), True),
        (RuntimeError("CUDA out of memory"), True),
    ],
    ids=["of all processes", "of one process", "memory"],
)
def test_what_the_second_process_of_a_host_tells(monkeypatch, capsys, error, told):
    """What all processes have found out, the first one tells; what befalls one alone, that one tells."""

    @entry_point
    def fails(argv):
        raise error

    for rank, lines in (("0", 1), ("1", int(told))):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as end:
            fails()
        assert end.value.code == 2
        assert capsys.readouterr().err.count("error: ") == lines, rank
