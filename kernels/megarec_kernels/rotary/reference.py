"""Rotary positions as products of complex numbers, differentiated by autograd."""

import torch
from torch import Tensor


def rotary_reference(x: Tensor, rotation: Tensor, interleaved: bool) -> Tensor:
    """Return x turned; arguments as in rotary."""
    R = rotation.shape[-1]
    first, second = slice(R), slice(R, 2 * R)
    if interleaved:
        first, second = slice(0, 2 * R, 2), slice(1, 2 * R, 2)
    wide = x.to(rotation.dtype)
    turned = torch.complex(wide[..., first], wide[..., second]) * torch.complex(*rotation)
    y = wide.clone()
    y[..., first], y[..., second] = turned.real, turned.imag
    return y.to(x.dtype)
