"""tests/tools/bench_train.py counts the launches of a training step, which are what its time on a GPU is made of."""

import json

import pytest
import torch
from conftest import ROOT

from tests.tools.bench_train import count_operations, operations_of_a_step


@pytest.fixture
def count(tmp_path):
    return lambda layers: operations_of_a_step(layers, tmp_path / str(layers))


def test_operations_are_those_that_compute():
    """By hand: a view and an allocation are none, a norm is one forward and one backward, a product two backward."""
    weight, x = torch.ones(8), torch.randn(4, 8, requires_grad=True)
    w = torch.randn(8, 8, requires_grad=True)

    def step():
        with torch.profiler.record_function("here"):
            y = torch.nn.functional.rms_norm(x, (8,), weight, 1e-6).view(2, 2, 8).transpose(0, 1).reshape(4, 8)
            y = y @ w  # the reshape had to copy
            y.backward(torch.empty_like(y))

    found = count_operations(step)
    assert {name: times for (place, name), times in found.items() if place == "here"} == {
        "aten::rms_norm": 1,
        "aten::copy_": 1,
        "aten::mm": 1,
    }
    backward = {name: times for (place, name), times in found.items() if place == "backward"}
    assert backward["aten::mm"] == 2 and backward["aten::rms_norm backward"] == 1


def test_a_step_takes_few(count, capsys):
    """32 layers at 8 samples; 10,685 by this count before the adapters were one parameter."""
    two, three = count(2), count(3)
    a_layer = three.total() - two.total()
    assert two.total() + 30 * a_layer <= 3_600
    # What the optimizer does, it does for all adapters at once.
    optimizer = [{key: times for key, times in found.items() if "step" in key[0]} for found in (two, three)]
    assert optimizer[0] == optimizer[1]


def test_the_settings_that_make_it_so():
    config = json.loads((ROOT / "ds_zero2_no_offload.json").read_text())
    assert config["bf16"]["check_grad_overflow"] is False and config["zero_optimization"]["overlap_comm"] is False
    assert config["timers"]["throughput"]["enabled"] is False  # it would synchronise before every step
