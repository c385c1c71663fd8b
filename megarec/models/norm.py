"""Normalisation layers; statistics in float32 at least, whatever the activations are."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megarec.models.init import Initializer


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv 1910.07467, eq. 4)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., dim); the result has x's dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.weight.shape, eps=self.eps).to(x.dtype) * self.weight

    def init_weights(self, init: Initializer) -> None:
        """Start with scale 1."""
        init.constant(self.weight, 1.0)


class Scale(nn.Module):
    """x * weight, a weight a channel, at first the same for all."""

    def __init__(self, dim: int, start: float = 1.0) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Scale x (..., dim)."""
        return x * self.weight

    def init_weights(self, init: Initializer) -> None:
        """Start with the same scale in all channels."""
        init.constant(self.weight, self.start)


class HeadLayerNorm(nn.Module):
    """LayerNorm over each head's channels, one weight a channel, no bias.

    The cell norm of xLSTM 7B (arXiv 2503.13427, section 3): mean-centred, biased variance.
    """

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(num_heads * head_dim))

    def forward(self, x_BTHV: Tensor) -> Tensor:
        """Normalise x (..., H, V) over V; returns (..., H * V), in x's dtype."""
        wide = x_BTHV.to(torch.promote_types(x_BTHV.dtype, torch.float32))
        normed = F.layer_norm(wide, wide.shape[-1:], eps=self.eps)
        return normed.to(x_BTHV.dtype).flatten(-2) * self.weight

    def init_weights(self, init: Initializer) -> None:
        """Start with scale 1."""
        init.constant(self.weight, 1.0)


class GatedGroupRMSNorm(nn.Module):
    """RMSNorm of x * silu(gate) over groups of channels, one weight a channel.

    The norm of Mamba-2 (arXiv 2405.21060, section 7): the gate first, then the norm; a group's
    statistics are its own, so that groups may lie on different ranks.
    """

    def __init__(self, dim: int, group_dim: int, eps: float) -> None:
        super().__init__()
        self.group_dim = group_dim
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Gate and normalise x (..., dim), any float dtype; the result has the gate's dtype."""
        dtype = torch.promote_types(gate.dtype, torch.float32)
        wide = x.to(dtype) * F.silu(gate.to(dtype))
        groups = wide.unflatten(-1, (-1, self.group_dim))
        normed = F.rms_norm(groups, (self.group_dim,), eps=self.eps).flatten(-2)
        return normed.to(gate.dtype) * self.weight

    def init_weights(self, init: Initializer) -> None:
        """Start with scale 1."""
        init.constant(self.weight, 1.0)
