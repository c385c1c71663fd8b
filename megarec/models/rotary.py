"""Angles of rotary positions (RoPE, arXiv 2104.09864), partial and with the usual scalings."""

import math
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor

from megarec.config.base import PositiveFloat, PositiveInt, Registered, StrictModel


class RotaryScaling(Registered):
    """How frequencies change so that a model reads longer texts than it was trained on."""

    kind: ClassVar[str] = "rope scaling"

    @abstractmethod
    def scale(self, frequency_R: Tensor, base: float) -> Tensor:
        """Return the frequencies (R,), in radians a token, that replace the plain ones."""

    def magnitude(self) -> float:
        """Return the factor on cos and sin."""
        return 1.0


class LinearScaling(RotaryScaling):
    """All frequencies divided by `factor`: positions are interpolated (arXiv 2306.15595)."""

    type: Literal["linear"] = "linear"
    factor: PositiveFloat

    def scale(self, frequency_R: Tensor, base: float) -> Tensor:
        """Divide; see RotaryScaling."""
        return frequency_R / self.factor


class Llama3Scaling(RotaryScaling):
    """Llama 3.1's: wavelengths above L / low are stretched by `factor`, those below L / high kept.

    L is `original_max_seq_len`; between the two bounds the frequencies blend linearly.
    """

    type: Literal["llama3"] = "llama3"
    factor: PositiveFloat
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_seq_len: PositiveInt

    def scale(self, frequency_R: Tensor, base: float) -> Tensor:
        """Blend; see RotaryScaling."""
        turns_R = self.original_max_seq_len * frequency_R / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept_R = ((turns_R - low) / (high - low)).clamp(0, 1)
        return frequency_R * (kept_R + (1 - kept_R) / self.factor)


class YarnScaling(RotaryScaling):
    """YaRN (arXiv 2309.00071): fast dimensions kept, slow ones interpolated, a ramp between.

    Dimensions that make more than `beta_fast` turns over `original_max_seq_len` are fast, those
    with fewer than `beta_slow` slow. `attention_factor` multiplies cos and sin; by default it is
    0.1 ln(factor) + 1 (section 3.4).
    """

    type: Literal["yarn"] = "yarn"
    factor: PositiveFloat
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = None
    original_max_seq_len: PositiveInt

    def scale(self, frequency_R: Tensor, base: float) -> Tensor:
        """Blend over the dimensions between the two bounds; see RotaryScaling."""
        half = len(frequency_R)

        def dimension(turns: float) -> float:
            reach = self.original_max_seq_len / (turns * 2 * math.pi)
            return half * math.log(reach) / math.log(base)

        low = max(math.floor(dimension(self.beta_fast)), 0)
        high = min(math.ceil(dimension(self.beta_slow)), 2 * half - 1)
        index_R = torch.arange(half, dtype=frequency_R.dtype, device=frequency_R.device)
        slow_R = ((index_R - low) / max(high - low, 0.001)).clamp(0, 1)
        return frequency_R * (1 - slow_R + slow_R / self.factor)

    def magnitude(self) -> float:
        """Return the attention factor; see RotaryScaling."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


class RotaryConfig(StrictModel):
    """Dimension pair r of the first `fraction` of a head turns by base^(-2r / size) a token.

    Pair r is dimensions r and r + size / 2, as in Llama, or `interleaved` 2r and 2r + 1, as in the
    paper.
    """

    base: PositiveFloat = 10_000.0
    interleaved: bool = False
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    scaling: SerializeAsAny[RotaryScaling] | None = None

    def size(self, head_dim: int) -> int:
        """Return the number of dimensions of a head that turn."""
        return int(head_dim * self.fraction)

    def problems(self, head_dim: int) -> list[str]:
        """Dimensions turn in pairs."""
        size = self.size(head_dim)
        if size > 0 and size % 2 == 0:
            return []
        return [
            f"rope.fraction: head_dim={head_dim} x {self.fraction} gives {size} rotary dimensions; "
            "expected an even number of at least 2"
        ]


def rotation(config: RotaryConfig, head_dim: int, position: Tensor, dtype: torch.dtype) -> Tensor:
    """Return cos and sin of the angles at integer positions (..., T): (2, ..., T, 1, size / 2).

    They are computed in promote_types(dtype, float32), and are what the op `rotary` takes.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    size = config.size(head_dim)
    exponent_R = torch.arange(0, size, 2, dtype=dtype, device=position.device) / size
    frequency_R = config.base**-exponent_R
    magnitude = 1.0
    if config.scaling is not None:
        frequency_R = config.scaling.scale(frequency_R, config.base)
        magnitude = config.scaling.magnitude()
    angle = position[..., None].to(dtype) * frequency_R
    return magnitude * torch.stack([angle.cos(), angle.sin()])[..., None, :]
