"""Norms over groups of channels in plain PyTorch, with the backward written out.

Kept are the inputs and the statistics of a group. What is of the size of x is made anew, and in
place: fresh memory costs more than arithmetic.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_norm_eager(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    output_gate: Tensor | None,
    group_dim: int,
    center: bool,
    eps: float,
) -> Tensor:
    """Return the norm; arguments as in grouped_norm."""
    return _normalize(x, weight, gate, output_gate, group_dim, center, eps)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        gate: Tensor | None,
        output_gate: Tensor | None,
        group_dim: int,
        center: bool,
        eps: float,
    ) -> Tensor:
        u = _enter(x, gate).unflatten(-1, (-1, group_dim))
        mean = None
        if center:
            y, mean, scale = torch.native_layer_norm(u, [group_dim], None, None, eps)
        else:
            scale = u.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            y = u * scale
        ctx.save_for_backward(x, weight, gate, output_gate, mean, scale)
        ctx.group_dim = group_dim
        y = y.flatten(-2).to((x if gate is None else gate).dtype)
        if weight is not None:
            y = y * weight
        if output_gate is not None:
            y = (y * torch.sigmoid(output_gate.to(u.dtype))).to(y.dtype)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate, output_gate, mean, scale = ctx.saved_tensors
        u = _enter(x, gate)
        groups = u.unflatten(-1, (-1, ctx.group_dim))
        normed = ((groups if mean is None else groups - mean) * scale).flatten(-2)
        dy = dy.to(u.dtype)
        doutput_gate = dweight = dgate = None
        if output_gate is not None:
            sigmoid = torch.sigmoid(output_gate.to(u.dtype))
            change = torch.ops.aten.sigmoid_backward(dy * normed, sigmoid)
            doutput_gate = change if weight is None else change.mul_(weight)
            dy = sigmoid.mul_(dy)
        product = dy * normed
        if weight is not None:
            dweight = product.reshape(-1, product.shape[-1]).sum(0)
            product.mul_(weight)
        # du = scale (dnormed - normed mean(dnormed normed) - mean(dnormed)), over a group.
        along = product.unflatten(-1, (-1, ctx.group_dim)).mean(-1, keepdim=True)
        dnormed = dy if weight is None else torch.mul(dy, weight, out=product)
        dnormed = dnormed.unflatten(-1, (-1, ctx.group_dim))
        du = torch.addcmul(dnormed, normed.unflatten(-1, (-1, ctx.group_dim)), along, value=-1)
        if mean is not None:
            du -= dnormed.mean(-1, keepdim=True)
        dx = du = du.mul_(scale).flatten(-2)
        if gate is not None:
            wide_gate = gate.to(u.dtype)
            dgate = torch.ops.aten.silu_backward(du * x, wide_gate).to(gate.dtype)
            dx = du.mul_(F.silu(wide_gate))
        return (
            dx.to(x.dtype),
            None if dweight is None else dweight.to(weight.dtype),
            dgate,
            None if doutput_gate is None else doutput_gate.to(output_gate.dtype),
            *[None] * 3,
        )


@torch.compiler.allow_in_graph
def _normalize(*args: Any) -> Tensor:
    """Apply it; torch.compile takes it as a whole and traces both of its passes."""
    y: Tensor = _Normalize.apply(*args)
    return y


def _enter(x: Tensor, gate: Tensor | None) -> Tensor:
    """Return what is normalised, in the dtype of the computation."""
    wide = torch.promote_types((x if gate is None else gate).dtype, torch.float32)
    return x.to(wide) if gate is None else F.silu(gate.to(wide)).mul_(x.to(wide))
