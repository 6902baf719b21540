"""LoRA's layers in few operations, and those of docs/how_it_works.md, compute what PEFT's own layers do."""

import copy
import re

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from torch import nn

from support.training.fused_lora import FusedLinear, fuse


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_those_of_peft(bias, dropout, training):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 96, bias=False), nn.SiLU(), nn.Linear(96, 32, bias))
    inputs = torch.randn(3, 7, 48)
    if not dropout:  # which draws in the order of memory
        inputs = inputs.transpose(0, 1)
    found = []
    for fused in (False, True):
        config = LoraConfig(r=4, lora_alpha=10, lora_dropout=dropout, target_modules=["0", "2"])
        if fused:
            fuse(config)
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(net), config).train(training)
        assert isinstance(model.base_model.model[0], FusedLinear) == fused
        adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in adapters:
            nn.init.normal_(parameter)  # B would be zero
        x = inputs.clone().requires_grad_()
        torch.manual_seed(2)  # the same inputs are dropped
        first, second = model(x), model(inputs)  # of the latter nobody wants the gradient
        (first.pow(2) * 0.1 + second.sin()).sum().backward()
        with torch.no_grad(), model.disable_adapter():
            off = model(x)
        found.append([first, second, off, x.grad, *(parameter.grad for parameter in adapters)])
    assert (found[0][2] - found[0][0]).abs().max() > 1  # the adapters do something
    for expected, own in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6 * float(expected.detach().abs().max()))


def test_rounding_in_bfloat16_is_no_worse_than_that_of_peft():
    torch.manual_seed(0)
    layer, x, found = nn.Sequential(nn.Linear(256, 512, bias=False)), torch.randn(64, 256).bfloat16(), []
    for fused, dtype in ((False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16)):
        config = LoraConfig(r=16, lora_alpha=64, target_modules=["0"])
        if fused:
            fuse(config)
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(layer).bfloat16(), config, autocast_adapter_dtype=False)
        adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in adapters:
            nn.init.normal_(parameter, std=0.1)
        y = model.to(dtype)(x.to(dtype))
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append([tensor.float() for tensor in (y.detach(), *(parameter.grad for parameter in adapters))])
    for exact, by_peft, own in zip(*found, strict=True):
        assert (own - exact).norm() <= 1.05 * (by_peft - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("page", ["how_it_works.md", "how_it_works_zh.md"])
def test_lora_as_the_docs_write_it_is_that_of_peft(page):
    (code,) = re.findall(
        r"```python\n(class LoRA.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL
    )
    exec(code, docs := {"torch": torch})
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(48, 96), nn.SiLU(), nn.Sequential(nn.Linear(96, 32))).requires_grad_(False)
    x, frozen = torch.randn(3, 7, 48), copy.deepcopy(ours)
    peft = get_peft_model(copy.deepcopy(ours), LoraConfig(r=4, lora_alpha=10, lora_dropout=0.3, target_modules=["0"]))
    docs["add_lora"](ours, ["0"], r=4, alpha=10, dropout=0.3)
    assert torch.equal(ours(x), frozen(x))  # B is zero
    trained = [[weight for weight in model.parameters() if weight.requires_grad] for model in (ours, peft)]
    with torch.no_grad():
        for weight, theirs in zip(*trained, strict=True):
            weight.copy_(theirs.normal_())
    outputs = []
    for model in (ours, peft.train()):
        torch.manual_seed(1)  # the same inputs are dropped
        outputs.append(model(x))
        outputs[-1].sin().sum().backward()
    assert (outputs[0] - frozen(x)).abs().max() > 1
    gradients = [[weight.grad for weight in weights] for weights in trained]
    ours[0], ours[2][0] = ours[0].merged(), ours[2][0].merged()
    merged = peft.merge_and_unload()
    for own, theirs in (outputs, (ours(x), merged(x)), *zip(*gradients)):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().max()))
