"""All adapters as one parameter, since DeepSpeed works parameter by parameter.

Its reduction over processes, gradient norm and update launch some fifteen operations for each parameter. Adapters are
320 small ones at 7B; as one long vector they cost a few dozen launches a step instead of thousands.

    flat      ┌── lora_A, layer 0 ──┬── lora_B, layer 0 ──┬── lora_A, … ──┐      DeepSpeed sees this one
    adapters   each a view of its part, in its own shape                         the model computes with these
"""

import torch
from torch import nn


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters, in the order of the vector."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def joined(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def initialize(model: nn.Module, start) -> object:
    """`start(flat)`, which gives DeepSpeed the one parameter, and then the adapters as views of it."""
    adapters = trained(model)
    flat = nn.Parameter(joined(parameter.detach() for parameter in adapters))
    model.register_parameter("adapters", flat)  # DeepSpeed moves it with the model, and looks up its name there
    try:
        engine = start(flat)
    finally:
        del model.adapters  # else it would be counted and saved beside its views
    for parameter, part in zip(adapters, flat.data.split([parameter.numel() for parameter in adapters])):
        parameter.data = part.view_as(parameter)
    return engine


def hand_over_gradients(engine):
    """Give DeepSpeed the gradients that the adapters have gathered, as that of the one parameter."""
    adapters = trained(engine.module)
    ((flat,),) = engine.optimizer.bit16_groups
    flat.grad = joined(parameter.grad for parameter in adapters)
    for parameter in adapters:
        parameter.grad = None
