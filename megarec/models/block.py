"""A block: norm, mixer, residual; then norm, feed-forward, residual; either may be missing."""

from functools import partial

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils.checkpoint import checkpoint, noop_context_fn

from megarec.config.model import BlockConfig, NormConfig
from megarec.models.context import Context
from megarec.models.ffn import FFN
from megarec.models.init import Initializer
from megarec.models.mixer import Mixer
from megarec.models.norm import RMSNorm, Scale
from megarec.models.recompute import keeping
from megarec.models.state import State


class Block(nn.Module):
    """x += s * mixer(norm(x)); x += s * ffn(norm(x)), or with norms elsewhere: see BlockConfig.

    The residual stream keeps x's dtype. `recompute = True` frees the block's activations in the
    forward pass and computes them again in the backward pass, all but the results of `saved_ops`
    (see recompute.find_ops); it is done in here so that parameter names never change.
    """

    def __init__(self, config: BlockConfig, d_model: int, norm: NormConfig) -> None:
        super().__init__()
        self.recompute = False
        self.saved_ops: frozenset[OpOverload] = frozenset()
        self.mixer: Mixer | None = None
        self.ffn: FFN | None = None
        self.skip = Scale(d_model) if config.learned_skip else None
        if config.mixer is not None:
            self.mixer_norm, self.mixer_residual = _branch(config, d_model, norm)
            self.mixer = config.mixer.build(d_model)
        if config.ffn is not None:
            self.ffn_norm, self.ffn_residual = _branch(config, d_model, norm)
            self.ffn = FFN(config.ffn, d_model)

    def forward(
        self, x_BTD: Tensor, ctx: Context, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Run the block on x (batch, time, d_model); returns x and the mixer's state."""
        if self.recompute and torch.is_grad_enabled():
            contexts = partial(keeping, self.saved_ops) if self.saved_ops else noop_context_fn
            return checkpoint(
                self._forward, x_BTD, ctx, state, use_reentrant=False, context_fn=contexts
            )
        return self._forward(x_BTD, ctx, state)

    def _forward(self, x_BTD: Tensor, ctx: Context, state: State | None) -> tuple[Tensor, State]:
        after: State = {}
        if self.mixer is not None:
            y_BTD, after = self.mixer(self.mixer_norm(x_BTD), ctx, state)
            x_BTD = self.mixer_residual(x_BTD if self.skip is None else self.skip(x_BTD), y_BTD)
        return self._feed_forward(x_BTD), after

    def compile_forward(self, backend: str) -> None:
        """Have torch.compile compile, at its first run, what runs a whole sequence."""
        self._forward = torch.compile(self._forward, backend=backend)  # type: ignore[method-assign]

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """Run the block on one token x (batch, d_model)."""
        after: State = {}
        if self.mixer is not None:
            y_BD, after = self.mixer.step(self.mixer_norm(x_BD), state)
            x_BD = self.mixer_residual(x_BD if self.skip is None else self.skip(x_BD), y_BD)
        return self._feed_forward(x_BD), after

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x if self.ffn is None else self.ffn_residual(x, self.ffn(self.ffn_norm(x)))

    def float32_modules(self) -> list[nn.Module]:
        """Return the modules whose parameters keep float32 in any precision."""
        names = () if self.mixer is None else self.mixer.float32_modules
        return [self.get_submodule(f"mixer.{name}") for name in names]

    def init_state(self, batch_size: int, device: torch.device) -> State:
        """Return the mixer's state before the first token; empty where there is no mixer."""
        return {} if self.mixer is None else self.mixer.init_state(batch_size, device)

    def init_weights(self, init: Initializer) -> None:
        """Write the initial value of every parameter."""
        if self.mixer is not None:
            _init_branch(self.mixer_norm, self.mixer_residual, init)
            self.mixer.init_weights(init)
        if self.skip is not None:
            self.skip.init_weights(init)
        if self.ffn is not None:
            _init_branch(self.ffn_norm, self.ffn_residual, init)
            self.ffn.init_weights(init)


class Residual(nn.Module):
    """x + s y, y being a branch's output; with its norm and its scale a channel, if it has any."""

    def __init__(self, config: BlockConfig, d_model: int, norm: NormConfig) -> None:
        super().__init__()
        self.factor = config.residual_scale
        placement, scale = config.norm_placement, config.layer_scale
        self.norms_branch = placement == "peri"
        self.norm = None if placement == "pre" else RMSNorm(d_model, norm.eps)
        self.scale = None if scale is None else Scale(d_model, scale)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the branch's output to the residual stream, both (..., d_model)."""
        if self.norm is not None and self.norms_branch:
            y = self.norm(y)
        if self.scale is not None:
            y = self.scale(y)
        # Most models do not scale: spare them a pass over the activations.
        x = x + y if self.factor == 1 else torch.add(x, y, alpha=self.factor)
        return x if self.norm is None or self.norms_branch else self.norm(x)

    def init_weights(self, init: Initializer) -> None:
        """Start with the configured scales."""
        for part in (self.norm, self.scale):
            if part is not None:
                part.init_weights(init)


def _branch(config: BlockConfig, d_model: int, norm: NormConfig) -> tuple[nn.Module, Residual]:
    """Return what stands before a mixer or an FFN, and what stands behind it."""
    before = nn.Identity() if config.norm_placement == "post" else RMSNorm(d_model, norm.eps)
    return before, Residual(config, d_model, norm)


def _init_branch(before: nn.Module, behind: Residual, init: Initializer) -> None:
    if isinstance(before, RMSNorm):
        before.init_weights(init)
    behind.init_weights(init)
