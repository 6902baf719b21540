"""Do two models compute the same? Their logits on the same texts, compared in float32 whatever dtype they are stored in."""

from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

POSITIONS = 64  # the last tokens of a text, whose logits are compared


class Agreement(NamedTuple):
    """How close found logits are to expected ones."""

    largest: float  # largest difference of two logits
    spread: float  # standard deviation of the expected logits
    divergence: float  # KL(expected ‖ found) in nats, mean over positions
    same_argmax: float  # share of positions
    worst: int  # the text with the largest difference


def compute_in_float32(model: torch.nn.Module):
    """Make `model` compute in float32: a module's parameters are widened while it runs, the others stay as stored.

    Two models in half precision differ by the rounding of their activations alone, and more so than by that of their
    weights, which is what a comparison should show. The memory is that of the largest single weight.
    """
    stored = {}

    def widen(module, inputs):
        parameters = list(module.parameters(recurse=False))
        stored[module] = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.float()

    def restore(module, inputs, output):
        for parameter, data in zip(module.parameters(recurse=False), stored.pop(module)):
            parameter.data = data

    for module in model.modules():
        if any(parameter.dtype != torch.float32 for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(restore)


@torch.no_grad()
def logits_of(model: torch.nn.Module, texts: list[list[int]]) -> list[torch.Tensor]:
    """The logits at the last POSITIONS tokens of each text, (up to POSITIONS, V) in float32 on the CPU.

    Args:
        model: a causal language model with `model` and `lm_head`, as Baichuan and LLaMA have them.
        texts: token ids. They run as one batch, padded on the right, where no token sees the padding.
    """
    ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True).to(model.device)  # (b, l)
    lengths = torch.tensor([[len(text)] for text in texts], device=model.device)
    position = torch.arange(ids.shape[1], device=model.device)
    mask = position < lengths
    hidden = model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    kept = mask & (position >= lengths - POSITIONS)
    return list(model.lm_head(hidden[kept]).float().cpu().split(kept.sum(1).tolist()))


def compare(expected: list[torch.Tensor], found: list[torch.Tensor]) -> Agreement:
    """Both as `logits_of` returns them. A logit that is not finite makes the largest difference infinite."""
    largest, divergence, same, squares = [], [], [], []
    for p, q in zip(expected, found):  # (positions, V)
        largest.append((p - q).abs().nan_to_num(torch.inf).max().item())
        same.append(p.argmax(-1) == q.argmax(-1))
        squares.append(p.var().item())
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)  # divergences of 1e-9 mean something
        divergence.append((p.exp() * (p - q)).sum(-1))
    worst = max(range(len(largest)), key=largest.__getitem__)
    spread = (sum(squares) / len(squares)) ** 0.5
    return Agreement(
        largest[worst], spread, torch.cat(divergence).mean().item(), torch.cat(same).float().mean().item(), worst
    )
