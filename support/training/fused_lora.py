"""LoRA's layers in few operations: y = W x + s · B A d(x), where d is the dropout and s = alpha / r.

On a GPU every operation is a launch, and in a step of few tokens launches can take longer than arithmetic. PEFT's own
layer takes six operations forward and eight backward. Here they are four and six, since a matrix product can also scale
and add:

    t = A d(x)                  ∂A = ∂t d(x)ᵀ      ∂t = s Bᵀ ∂y
    y = W x,  y += s B t        ∂B = s ∂y tᵀ       ∂x = d(Aᵀ ∂t),  ∂x += Wᵀ ∂y
"""

import torch
from peft import LoraConfig
from peft.tuners import lora


def fuse(config: LoraConfig):
    """Have PEFT use these layers, for a model that is not in four bits."""
    config._register_custom_module({torch.nn.Linear: FusedLinear})


class FusedLinear(lora.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) → (…, out)."""
        if self.disable_adapters or self.merged or self.base_layer.bias is not None:
            return super().forward(x)
        (name,) = self.active_adapters
        dropout = self.lora_dropout[name]
        share = dropout.p if self.training and isinstance(dropout, torch.nn.Dropout) else 0.0
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _FusedLinear.apply(x, self.base_layer.weight, a, b, self.scaling[name], share)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, a, b, scaling: float, dropout: float):
        """x (…, in), weight (out, in), a (r, in), b (out, r)."""
        rows = x.flatten(0, -2)  # (n, in)
        dropped, mask = torch.native_dropout(rows, dropout, True) if dropout else (rows, None)
        low = dropped @ a.t()  # (n, r)
        y = (rows @ weight.t()).addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(weight, a, b, dropped, mask, low)
        ctx.scaling, ctx.dropout = scaling, dropout
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad_y):
        weight, a, b, dropped, mask, low = ctx.saved_tensors
        grad_rows = grad_y.flatten(0, -2)  # (n, out)
        # With a beta of 0 the first argument gives no more than its shape.
        grad_low = torch.addmm(low, grad_rows, b, beta=0, alpha=ctx.scaling)
        grad_b = torch.addmm(b, grad_rows.t(), low, beta=0, alpha=ctx.scaling)
        grad_a = grad_low.t() @ dropped
        grad_x = None
        if ctx.needs_input_grad[0]:  # not in the first layer
            grad_x = grad_low @ a
            if mask is not None:
                grad_x = torch.ops.aten.native_dropout_backward(grad_x, mask, 1 / (1 - ctx.dropout))
            grad_x = grad_x.addmm_(grad_rows, weight).view(*grad_y.shape[:-1], -1)
        return grad_x, None, grad_a, grad_b, None, None
