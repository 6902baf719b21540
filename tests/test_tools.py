"""Tools that no other test runs: what a training step asks of a GPU, and the check of one, on the CPU."""

import fcntl
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import utils
from baichuan import BaichuanConfig
from tests.tools import gpu_check, memory_table, roofline, shared
from tests.tools.steps import training_step


def test_a_step_takes_few_operations(tmp_path):
    """10,685 before the adapters were one parameter, 3,457 with PEFT's own layers, 2,741 with autograd's rotation."""
    flags = ["--model_name_or_path", shared.write_model(tmp_path), "--train_path", str(tmp_path / "train.json")]
    flags += ["--test_path", str(tmp_path / "test.json"), "--output_dir", str(tmp_path / "run")]
    gather, update, steps = training_step(flags)
    data, indices = steps.data, np.arange(8)
    one, two = (roofline.passes("tree", data, indices, layers) for layers in (1, 2))
    # Five linear layers, each of so many operations forward and backward as support/training/fused_lora.py says.
    assert two["adapters, dropout"][0] - one["adapters, dropout"][0] == 5 * (3 + 5)
    assert two["frozen linear layers"][0] - one["frozen linear layers"][0] == 5 * (1 + 1)
    found = roofline.whole_step("tree", data, indices)
    assert found["in all"][0] <= 2_600
    # Multiplications, as the sizes of the weights give them.
    config, (row,) = BaichuanConfig(), utils.Collator(data, "tree", 4096, 2)(data.in_tree_order(indices))
    sizes = row["input_ids"].numel(), len(row["loss_positions"])
    computed = shared.arithmetic(config, memory_table.adapter_parameters(config, 16), *sizes)
    assert found["in all"][1] - found["attention"][1] == pytest.approx(computed, rel=0.01)
    # What the optimizer does, it does for all adapters at once.
    for _ in range(2):  # the first one also makes its state
        numbers = gather(*steps[0])
        with roofline.Walk("cpu") as walk:
            update(numbers)
    launches, _, moved, *_ = sum(walk.found.values())
    trained = memory_table.adapter_parameters(BaichuanConfig.from_pretrained(flags[1]), 16)
    assert (launches, moved / trained) == pytest.approx(roofline.OWN_END, rel=0.1)
    # What a CPU does not show: checks of each tensor, and waits before every step.
    config = json.loads((ROOT / "ds_zero2_no_offload.json").read_text())
    assert config["bf16"]["check_grad_overflow"] is False and config["zero_optimization"]["overlap_comm"] is False
    assert config["timers"]["throughput"]["enabled"] is False


def make(directory, *arguments):
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    return subprocess.run(["make", *arguments], cwd=directory, env=own, capture_output=True, text=True)


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock")
def test_a_second_demo_leaves_the_first_one_alone(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "output_dir/demo").mkdir(parents=True)
    with open(tmp_path / "Makefile") as makefile:
        fcntl.flock(makefile, fcntl.LOCK_EX)
        second = make(tmp_path, "demo", "PYTHON=false")
    assert second.returncode == 2 and second.stdout == "" and (tmp_path / "output_dir/demo").exists()
    assert second.stderr.startswith("error: make demo runs in another terminal: wait for its end\n")


@pytest.mark.parametrize("python", ["3.10", "3.15", "no venv", "missing"])
def test_setup_tells_which_python_it_needs_before_pip_is_asked(python, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements", "requirements-4bit", "requirements-dev", "constraints"):
        (tmp_path / f"{name}.txt").touch()
    pretend = "sys.modules['ensurepip'] = None"
    if python.startswith("3."):
        pretend = f"sys.version_info = (3, {python[2:]}, 0)"
    if python != "missing":
        (tmp_path / "python").write_text(f"""#!/bin/sh\n{sys.executable} -c "import sys; {pretend}; $2"\n""")
        (tmp_path / "python").chmod(0o755)
    run = make(tmp_path, "setup", "PYTHON=./python")
    told = "is no Python 3.11 to 3.14: install one, then: rm -rf .venv; make setup PYTHON=python3.12"
    if python == "no venv":
        told = "has no venv: apt-get install python-venv"
    assert run.stderr.splitlines()[0] == f"error: ./python {told}"
    assert run.returncode == 2 and run.stdout == "" and not (tmp_path / ".venv").exists()


def test_gpu_check_tells_what_failed_and_goes_on(tmp_path, monkeypatch):
    """A part in a process of its own, and one here, which takes less time."""
    execute = gpu_check.execute

    def watched(args, command):
        gpu_check.main(command[2:]) if command[-1] == "weights" else execute(args, command)

    monkeypatch.setattr(gpu_check, "execute", watched)
    flags = ["--size", "tiny", "--steps", "4", "--seconds", "3600", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        gpu_check.main([*flags, "--parts", "merge", "weights"])
    assert end.value.code == 1
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert [found["status"] for found in parts.values()] == ["FAILED", "ok"]
    assert parts["merge"]["text"] == "error: no training part has written an adapter"
    assert len((tmp_path / "table.md").read_text().splitlines()) == 4
