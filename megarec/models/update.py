"""Update rules of a looped stack: how the core's output and the state before it make the next."""

from abc import abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from megarec.config.activations import Numbers, rms_norm
from megarec.config.base import PositiveFloat
from megarec.config.stack import UpdateConfig
from megarec.models.init import Initializer
from megarec.models.norm import RMSNorm


class Update(nn.Module):
    """s' = update(F, s); every dim of both but the last is batch."""

    @abstractmethod
    def forward(self, new: Tensor, old: Tensor) -> Tensor:
        """Return the next latent state.

        Args:
            new: F, the core's output, (..., d_model).
            old: s, the latent state before it.
        """

    def init_weights(self, init: Initializer) -> None:
        """Write the initial value of every parameter."""


class EulerConfig(UpdateConfig):
    """(1 - dt) s + dt F: SCORE's contractive step (arXiv 2603.10544)."""

    type: Literal["euler"] = "euler"
    dt: Annotated[float, Field(ge=0, le=1)] = 0.5

    def build(self, d_model: int) -> Update:
        """Build the module."""
        return Euler(self)


class Euler(Update):
    """(1 - dt) s + dt F."""

    def __init__(self, config: EulerConfig) -> None:
        super().__init__()
        self.dt = config.dt

    def forward(self, new: Tensor, old: Tensor) -> Tensor:
        """Take the step, rounding once; see Update."""
        return torch.lerp(old, new, self.dt)


class GatedConfig(UpdateConfig):
    """z F + (1 - z) s, z = sigmoid(W [F; s] + b) a channel (arXiv 2603.21676).

    `bias` is the initial b: at -2 a step keeps 88% of the state.
    """

    type: Literal["gated"] = "gated"
    bias: Annotated[float, Field(allow_inf_nan=False)] = -2.0

    def num_params(self, d_model: int) -> int:
        """Count W and b."""
        return 2 * d_model * d_model + d_model

    def flops_per_token(self, d_model: int) -> float:
        """Count W."""
        return 4.0 * d_model * d_model

    def activations(self, d_model: int) -> Numbers:
        """Count [F; s], F, s and z in float32."""
        return Numbers(narrow=2 * d_model, wide=2 * d_model, copies=d_model)

    def build(self, d_model: int) -> Update:
        """Build the module."""
        return Gated(self, d_model)


class Gated(Update):
    """z F + (1 - z) s, z = sigmoid(W [F; s] + b); the gate is computed in float32 at least."""

    def __init__(self, config: GatedConfig, d_model: int) -> None:
        super().__init__()
        self.initial_bias = config.bias
        self.gate = WideBias(2 * d_model, d_model)

    def forward(self, new: Tensor, old: Tensor) -> Tensor:
        """Mix the two; see Update."""
        dtype = torch.promote_types(new.dtype, torch.float32)
        z = torch.sigmoid(self.gate(torch.cat([new, old], -1)))
        return torch.lerp(old.to(dtype), new.to(dtype), z).to(new.dtype)

    def init_weights(self, init: Initializer) -> None:
        """Draw W with std; see Update."""
        init.normal(self.gate.weight, init.std)
        init.constant(self.gate.bias, self.initial_bias)


class WideBias(nn.Linear):
    """A linear map whose bias is added in float32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out), float32 at least."""
        y = F.linear(x, self.weight)
        dtype = torch.promote_types(y.dtype, torch.float32)
        return y.to(dtype) + self.bias.to(dtype)


class NormedConfig(UpdateConfig):
    """RMSNorm(F): a norm after each loop, as in looped language models (arXiv 2510.25741)."""

    type: Literal["normed"] = "normed"
    eps: PositiveFloat = 1e-6

    def num_params(self, d_model: int) -> int:
        """Count the norm's scale."""
        return d_model

    def activations(self, d_model: int) -> Numbers:
        """Count the norm's."""
        return rms_norm(d_model)

    def build(self, d_model: int) -> Update:
        """Build the module."""
        return Normed(self, d_model)


class Normed(Update):
    """RMSNorm(F)."""

    def __init__(self, config: NormedConfig, d_model: int) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, config.eps)

    def forward(self, new: Tensor, old: Tensor) -> Tensor:
        """Normalise; see Update."""
        return self.norm(new)

    def init_weights(self, init: Initializer) -> None:
        """Start with scale 1; see Update."""
        self.norm.init_weights(init)
