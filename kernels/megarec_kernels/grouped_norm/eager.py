"""Norms over groups of channels by torch's own."""

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_norm_eager(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    group_dim: int,
    center: bool,
    eps: float,
) -> Tensor:
    """Return the norm; arguments as in grouped_norm."""
    narrow = (x if gate is None else gate).dtype
    wide = torch.promote_types(narrow, torch.float32)
    u = x.to(wide)
    if gate is not None:
        u = u * F.silu(gate.to(wide))
    norm = F.layer_norm if center else F.rms_norm
    y = norm(u.unflatten(-1, (-1, group_dim)), (group_dim,), eps=eps).flatten(-2).to(narrow)
    return y if weight is None else y * weight
