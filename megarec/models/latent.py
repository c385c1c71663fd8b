"""Random initial latent states: each number a pure function of what it belongs to."""

import math

import torch
from torch import Tensor

from megarec.models.init import seed_from

CUT = 3.0
"""Standard deviations at which the normal distribution is cut."""


def random_latent(
    position: Tensor, sample_B: Tensor | None, d_model: int, std: float, *seed: int
) -> Tensor:
    """Draw s_0 of each token from N(0, std^2), cut at CUT standard deviations (before scaling).

    A number depends on the seed, its sample, position and channel alone: so it is the same however
    a batch is cut, distributed or decoded.

    Args:
        position: of each token in its document, int64 (B, T) or (B,).
        sample_B: the number of each row in the stream of samples, int64 (B,); None: 0 for all.
        d_model: number of channels.
        std: before the cut.
        seed: whole numbers that name the draw, the training step among them.

    Returns:
        float32 (B, T, d_model) or (B, d_model).
    """
    if sample_B is None:
        sample_B = position.new_zeros(position.shape[0])
    key_B = _mix(sample_B + seed_from("latent", *seed))
    key = _mix(key_B.view(-1, *[1] * (position.dim() - 1)) ^ position)
    bits = _mix(key[..., None] ^ torch.arange(d_model, device=position.device))
    # 23 bits make a float32 in (0, 1) exactly, the half keeping it off both ends.
    uniform = ((bits >> 41 & 0x7FFFFF).float() + 0.5) / 2**23
    inside = math.erf(CUT / 2**0.5)
    return std * 2**0.5 * torch.erfinv(inside * (2 * uniform - 1))


def _mix(x: Tensor) -> Tensor:
    """Return splitmix64's output function of int64 numbers, seen as unsigned ones."""
    x = x * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ _shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    # A logical shift: torch's keeps the sign.
    return x >> bits & (1 << 64 - bits) - 1
