"""Tools that no other test runs: what a training step launches on a GPU, and the check of one, on the CPU."""

import fcntl
import json
import os
import shutil
import subprocess

import pytest
from conftest import ROOT

from tests.tools import gpu_check
from tests.tools.operations import operations_of_a_step


def test_a_step_takes_few_operations():
    """32 layers at 8 samples; 10,685 before the adapters were one parameter, 3,457 with PEFT's own layers."""
    two, three = operations_of_a_step(2), operations_of_a_step(3)
    a_layer = three.total() - two.total()
    assert two.total() + 30 * a_layer <= 3_000
    # What the optimizer does, it does for all adapters at once.
    optimizer = [{key: times for key, times in found.items() if "step" in key[0]} for found in (two, three)]
    assert optimizer[0] == optimizer[1]
    # What a CPU does not show: checks of each tensor, and waits before every step.
    config = json.loads((ROOT / "ds_zero2_no_offload.json").read_text())
    assert config["bf16"]["check_grad_overflow"] is False and config["zero_optimization"]["overlap_comm"] is False
    assert config["timers"]["throughput"]["enabled"] is False


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock")
def test_a_second_demo_leaves_the_first_one_alone(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "output_dir/demo").mkdir(parents=True)
    with open(tmp_path / "Makefile") as makefile:
        fcntl.flock(makefile, fcntl.LOCK_EX)
        own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
        command = ["make", "demo", "PYTHON=false"]
        second = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True)
    assert second.returncode == 2 and second.stdout == "" and (tmp_path / "output_dir/demo").exists()
    assert second.stderr.startswith("error: make demo runs in another terminal: wait for its end\n")


def test_gpu_check_tells_what_failed_and_goes_on(tmp_path):
    flags = ["--size", "tiny", "--steps", "4", "--seconds", "3600", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        gpu_check.main([*flags, "--parts", "merge", "weights"])
    assert end.value.code == 1
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert [found["status"] for found in parts.values()] == ["FAILED", "ok"]
    assert parts["merge"]["text"] == "error: no training part has written an adapter"
    assert len((tmp_path / "table.md").read_text().splitlines()) == 4
