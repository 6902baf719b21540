"""Do two models compute the same? Their logits on the same texts, compared in float32 whatever dtype they are stored in."""

from typing import NamedTuple

import torch

from support.model.answering import greedy, left_padded


class Agreement(NamedTuple):
    """How close found logits are to expected ones."""

    largest: float  # largest difference of two logits
    spread: float  # standard deviation of the expected logits
    divergence: float  # KL(expected ‖ found) in nats, mean over positions
    same_argmax: float  # share of positions
    worst: int  # the text with the largest difference


def compute_in_float32(model: torch.nn.Module):
    """Make `model` compute in float32: a module's weight is widened while it runs, the others stay as stored.

    In half precision the activations are rounded too, and that hides the differences of the weights, which a
    comparison should show. This takes the memory of the largest single weight, once for all of them.
    """
    stored = {}
    wide = torch.empty(0)

    def widen(module, inputs):
        nonlocal wide
        data = stored[module] = module.weight.data
        if wide.numel() < data.numel() or wide.device != data.device:
            wide = torch.empty(data.numel(), device=data.device)
        module.weight.data = wide[: data.numel()].view_as(data).copy_(data)

    def restore(module, inputs, output):
        module.weight.data = stored.pop(module)

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(lambda module, inputs, rows: rows.float())  # the few that were looked up
        elif any(parameter.dtype != torch.float32 for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(restore)


def compare_logits(expected: list[torch.Tensor], found: list[torch.Tensor]) -> Agreement:
    """Of each text (positions, V) in float32. A logit that is not finite makes the largest difference infinite."""
    largest, divergence, same, squares = [], [], [], []
    for p, q in zip(expected, found):  # (positions, V)
        largest.append((p - q).abs().nan_to_num(torch.inf).max().item())
        same.append(p.argmax(-1) == q.argmax(-1))
        squares.append(p.var().item())
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)  # divergences of 1e-9 mean something
        divergence.append((p.exp() * (p - q)).sum(-1))
    return Agreement(
        largest=max(largest),
        spread=(sum(squares) / len(squares)) ** 0.5,
        divergence=torch.cat(divergence).mean().item(),
        same_argmax=torch.cat(same).float().mean().item(),
        worst=largest.index(max(largest)),
    )


@torch.no_grad()
def cache_error(model: torch.nn.Module, prompts: list[list[int]], pad: int, new_tokens: int = 4) -> float:
    """How far `generate` with its cache is from whole passes: the largest root mean square of a token's logit errors.

    The prompts are generated from as one batch, padded on the left, and each is then read whole, without a cache and
    without padding. So the cache's order, the attention mask and the positions are all compared, in the model's dtype.
    Returns the error in standard deviations of the expected logits: rounding leaves it near 0, a lost cache near 1.
    """
    ids, mask = left_padded(prompts, pad, model.device)  # (b, l)
    config = greedy(model.generation_config, new_tokens)
    config.update(pad_token_id=pad, min_new_tokens=new_tokens, return_dict_in_generate=True, output_logits=True)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    worst = 0.0
    for row, prompt in enumerate(prompts):
        whole = output.sequences[row : row + 1, ids.shape[1] - len(prompt) :]
        expected = model(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1].float()  # (new_tokens, V)
        found = torch.stack([logits[row] for logits in output.logits]).float()
        errors = (found - expected).pow(2).mean(-1).sqrt() / expected.std(-1)
        worst = max(worst, errors.nan_to_num(torch.inf).max().item())
    return worst
