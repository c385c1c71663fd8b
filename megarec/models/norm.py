"""Normalisation layers; statistics in float32 at least, whatever the activations are."""

import torch
from megarec_kernels.grouped_norm import grouped_norm
from torch import Tensor, nn

from megarec.models.init import Initializer


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv 1910.07467, eq. 4)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., dim); the result has x's dtype."""
        return grouped_norm(x, self.weight, eps=self.eps)

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
    """LayerNorm over each head's channels, one weight a channel, no bias, times sigmoid(gate).

    The cell norm of xLSTM 7B (arXiv 2503.13427, section 3): mean-centred, biased variance.
    """

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(num_heads * head_dim))

    def forward(self, x_BTHV: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise x (..., H, V) over V and gate it; gate and result are (..., H * V)."""
        x, head_dim = x_BTHV.flatten(-2), x_BTHV.shape[-1]
        return grouped_norm(
            x, self.weight, eps=self.eps, group_dim=head_dim, output_gate=gate, center=True
        )

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
        return grouped_norm(x, self.weight, eps=self.eps, group_dim=self.group_dim, gate=gate)

    def init_weights(self, init: Initializer) -> None:
        """Start with scale 1."""
        init.constant(self.weight, 1.0)
