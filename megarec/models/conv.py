"""The short causal convolution before a recurrence."""

import torch
from megarec_kernels.causal_conv1d import causal_conv1d
from torch import Tensor, nn

from megarec.models.init import Initializer


class CausalConv(nn.Module):
    """Depthwise causal convolution and SiLU; the weight is laid out as nn.Conv1d's."""

    def __init__(self, channels: int, kernel: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(
        self, x_BTC: Tensor, resets: Tensor | None, tail: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the convolved sequence and the tail; see causal_conv1d."""
        return causal_conv1d(
            x_BTC, self.weight[:, 0], self.bias, resets=resets, tail=tail, activation="silu"
        )

    def init_state(self, batch_size: int, device: torch.device) -> Tensor:
        """Return the tail before the first token, zeros (B, kernel - 1, C)."""
        channels, _, kernel = self.weight.shape
        shape = (batch_size, kernel - 1, channels)
        return torch.zeros(shape, dtype=self.weight.dtype, device=device)

    def init_weights(self, init: Initializer) -> None:
        """Draw as nn.Conv1d does: uniformly within 1 / sqrt(kernel)."""
        bound = self.weight.shape[-1] ** -0.5
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                init.uniform(parameter, -bound, bound)
