"""Norms over groups of channels from their formula, differentiated by autograd."""

import torch
from torch import Tensor


def grouped_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    output_gate: Tensor | None,
    group_dim: int,
    center: bool,
    eps: float,
) -> Tensor:
    """Return the norm; arguments as in grouped_norm."""
    narrow = (x if gate is None else gate).dtype
    wide = torch.promote_types(narrow, torch.float32)
    u = x.to(wide)
    if gate is not None:
        u = u * gate.to(wide) * torch.sigmoid(gate.to(wide))
    u = u.unflatten(-1, (-1, group_dim))
    if center:
        u = u - u.mean(-1, keepdim=True)
    y = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)
    y = y.flatten(-2).to(narrow)
    if weight is not None:
        y = y * weight
    return y if output_gate is None else (y * torch.sigmoid(output_gate.to(wide))).to(y.dtype)
