"""A block: norm, mixer, residual; then norm, feed-forward, residual."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megarec.config.model import BlockConfig, NormConfig
from megarec.models.context import Context
from megarec.models.ffn import SwiGLU
from megarec.models.init import Initializer
from megarec.models.norm import RMSNorm
from megarec.models.state import State


class Block(nn.Module):
    """x += mixer(norm(x)); x += ffn(norm(x)). The residual stream keeps x's dtype.

    `recompute = True` frees the block's activations in the forward pass and computes them again
    in the backward pass; it is done in here so that parameter names never change.
    """

    def __init__(self, config: BlockConfig, d_model: int, norm: NormConfig) -> None:
        super().__init__()
        self.recompute = False
        self.mixer_norm = RMSNorm(d_model, norm.eps)
        self.mixer = config.mixer.build(d_model)
        self.ffn_norm: RMSNorm | None = None
        self.ffn: SwiGLU | None = None
        if config.ffn is not None:
            self.ffn_norm = RMSNorm(d_model, norm.eps)
            self.ffn = SwiGLU(config.ffn, d_model)

    def forward(
        self, x_BTD: Tensor, ctx: Context, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Run the block on x (batch, time, d_model); returns x and the mixer's state."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x_BTD, ctx, state, use_reentrant=False)
        return self._forward(x_BTD, ctx, state)

    def _forward(self, x_BTD: Tensor, ctx: Context, state: State | None) -> tuple[Tensor, State]:
        y_BTD, state = self.mixer(self.mixer_norm(x_BTD), ctx, state)
        return self._feed_forward(x_BTD + y_BTD), state

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """Run the block on one token x (batch, d_model)."""
        y_BD, state = self.mixer.step(self.mixer_norm(x_BD), state)
        return self._feed_forward(x_BD + y_BD), state

    def _feed_forward(self, x: Tensor) -> Tensor:
        if self.ffn is None or self.ffn_norm is None:
            return x
        return x + self.ffn(self.ffn_norm(x))

    def init_weights(self, init: Initializer) -> None:
        """Write the initial value of every parameter."""
        for module in (self.mixer_norm, self.mixer, self.ffn_norm, self.ffn):
            if module is not None:
                module.init_weights(init)
