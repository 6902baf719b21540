"""tests/tools/gpu_check.py, on the CPU with a tiny model: what it will print on a GPU, and that a part may fail."""

import json
import math
import sys
import time

import numpy as np
import psutil
import pytest
import torch

import utils
from support.dialogues.samples import read_samples
from support.model.directory import ModelDirectory
from tests.tools import gpu_check

STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(exit status, --out, what the parts found, arguments for a part), of a run whose part predict cannot succeed."""
    directory = tmp_path_factory.mktemp("gpu_check")
    out, scratch = directory / "out", directory / "scratch"
    flags = ["--size", "tiny", "--device", "cpu", "--steps", STEPS, "--out", out, "--scratch", scratch]
    flags += ["--seconds", 3600]
    parts = ["card", "weights", "predict", "tree_rows"]
    with pytest.raises(SystemExit) as end:  # 4,096 tokens are the whole context
        gpu_check.main([*map(str, flags), "--tokens", "4096", "--parts", *parts])
    args = gpu_check.parse_args([*map(str, flags), "--tokens", "8", "--repeats", "1", "--batch_sizes", "2", "3"])
    return end.value.code, out, json.loads((out / "gpu_check.json").read_text())["parts"], args


def test_a_part_that_fails_is_a_row_and_the_others_run(run):
    status, out, parts, _ = run
    assert status == 1
    assert {name: found["status"] for name, found in parts.items()} == {
        **{"card": "ok", "weights": "ok", "predict": "FAILED", "tree_rows": "ok"}
    }
    assert parts["predict"]["text"].startswith("ValueError: the system text")
    log = (out / "log.txt").read_text()
    own = log.split("──── predict")[1].split("──── ")[0]
    assert "Traceback" in own and parts["predict"]["text"] in own
    rows = (out / "table.md").read_text().splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == list(parts)
    assert [row.split("|")[2].strip() for row in rows] == ["ok", "ok", "FAILED", "ok"]


def test_the_numbers_of_a_training_run(run):
    _, _, parts, args = run
    found = parts["tree_rows"]
    assert len(found["losses"]) == STEPS and all(math.isfinite(loss) for loss in found["losses"])
    assert found["samples_per_second"] == pytest.approx(8000 / found["ms"])
    assert found["book_seconds"] == pytest.approx(1.002 * found["ms"])
    assert found["share"] > 0 and 0.2 < found["peak_gb"] < 16
    # Laid out anew: the mean over the steps that were timed.
    path, _ = gpu_check.samples(args)
    data = utils.RoleDataset(read_samples(path), ModelDirectory(gpu_check.base(args)).tokenizer, 512, 256)
    assert len(data) == 8 * STEPS == data.counts["read"]
    steps = utils.Steps(data, utils.Collator(data, "tree", 8192, 2), 8, 1, 1234)
    tokens = [sum(batch["input_ids"].numel() for batch in steps[step][0]) for step in range(STEPS // 2, STEPS)]
    assert found["tokens_a_step"] >= np.mean(tokens) - 0.5  # rows are more where that is cheaper, and tokens with them
    assert parts["weights"]["supervised"] == pytest.approx(data.supervised.mean())
    assert parts["weights"]["parameters"] == sum(
        tensor.numel() for tensor in ModelDirectory(gpu_check.base(args)).weights.tensors.values()
    )


def test_the_model_is_compared_with_llama(run, monkeypatch):
    args, as_llama = run[3], gpu_check.as_llama
    found = gpu_check.llama(args)
    assert found["float32"] < 1e-5 < found["bfloat16"] < 0.05

    def other(model):
        llama = as_llama(model)
        llama.model.norm.weight = torch.nn.Parameter(llama.model.norm.weight * 1.001)
        return llama

    monkeypatch.setattr(gpu_check, "as_llama", other)
    with pytest.raises(gpu_check.Failed, match="float32 differs by"):
        gpu_check.llama(args)


def test_gradients_of_tree_rows(run, monkeypatch):
    assert gpu_check.gradients(run[3])["float32"] < 1e-5
    sees = utils.tree_mask
    monkeypatch.setattr(utils, "tree_mask", lambda end, kind: sees(torch.full_like(end, end.shape[-1]), kind))
    with pytest.raises(gpu_check.Failed, match="gradients of tree rows"):  # every token sees all before it
        gpu_check.gradients(run[3])


def test_kernels_by_time(run):
    _, out, _, args = run
    found = gpu_check.kernels(args)
    times = [kernel["ms"] for kernel in found["top"]]
    assert len(times) == 15 and times == sorted(times, reverse=True) and sum(times) <= found["busy_ms"]
    assert found["top"][0]["name"] in (out / "profile.txt").read_text().splitlines()[3]


def test_merging_and_answering(run):
    args = run[3]
    merged = gpu_check.merge(args)
    assert merged["largest"] <= merged["most"] < merged["alone"] * 10
    assert (args.scratch / "merged/config.json").exists()
    page = gpu_check.page(args)
    assert page["tokens_per_second"] == pytest.approx(8 / page["page"]) and page["first"] > 0
    assert set(gpu_check.predict(args)["answers_per_second"]) == {2, 3}


def test_a_part_that_hangs_is_ended_with_all_it_started(tmp_path):
    args = gpu_check.parse_args(["--out", str(tmp_path)])
    (tmp_path / "log.txt").write_text("──── card: …\n")
    before = psutil.Process().children(recursive=True)
    args.part_end = time.time() + 1
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).wait()"
    with pytest.raises(gpu_check.Failed, match="did not end in time"):
        gpu_check.execute(args, [sys.executable, "-c", child])
    assert not set(psutil.Process().children(recursive=True)) - set(before)


def test_last_words(tmp_path):
    args = gpu_check.parse_args(["--out", str(tmp_path)])
    log = "──── card: …\nValueError: earlier\n──── merge: …\n 50%|███\r100%|███\nerror: no room\n[INFO] killing\n"
    (tmp_path / "log.txt").write_text(log, encoding="utf-8")
    assert gpu_check.last_words(args) == "error: no room"
    (tmp_path / "log.txt").write_text("──── merge: …\nKilled\n", encoding="utf-8")
    assert gpu_check.last_words(args) == "Killed"


def test_what_does_not_fit_is_said(run, capsys):
    args = gpu_check.parse_args(["--size", "7b", "--seconds", "30", "--out", str(run[1])])
    args.end = time.time() + 30
    with pytest.raises(gpu_check.Skipped, match="--seconds 30"):
        gpu_check.do(args, "resume")
    with pytest.raises(SystemExit):
        gpu_check.main(["--size", "7b", "--device", "cpu", "--out", str(run[1] / "7b")])
    assert capsys.readouterr().err.startswith("error: --size 7b: there is no GPU here")


@pytest.mark.slow
def test_every_part(tmp_path):
    flags = ["--size", "tiny", "--device", "cpu", "--steps", STEPS, "--out", tmp_path, "--tokens", 8, "--repeats", 1]
    try:
        gpu_check.main([*map(str, flags), "--batch_sizes", "2", "3", "--seconds", "900"])
    except SystemExit:
        pass  # a part failed: which, is seen below
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert list(parts) == list(gpu_check.PARTS)
    # Four bits need a package of their own.
    assert {name for name, found in parts.items() if found["status"] != "ok"} <= {"four_bits"}
    assert parts["resume"]["difference"] == 0 and parts["resume"]["killed_at"] < STEPS
