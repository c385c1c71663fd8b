"""Rotary positions in plain PyTorch, written where they belong: nothing is concatenated."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def rotary_eager(x: Tensor, rotation: Tensor, interleaved: bool) -> Tensor:
    """Return x turned; arguments as in rotary."""
    return _rotary(x, rotation, interleaved)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(rotation)
        ctx.interleaved = interleaved
        cos, sin = rotation
        return _turn(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (rotation,) = ctx.saved_tensors
        cos, sin = rotation
        return _turn(dy, cos, -sin, ctx.interleaved), None, None


_rotary: Callable[[Tensor, Tensor, bool], Tensor] = _Rotary.apply


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    y, R = x.new_empty(x.shape), cos.shape[-1]
    (x_first, x_second), (y_first, y_second) = (_pairs(z, R, interleaved) for z in (x, y))
    y_first.copy_((x_first * cos).sub_(x_second * sin))
    y_second.copy_((x_second * cos).add_(x_first * sin))
    y[..., 2 * R :] = x[..., 2 * R :]
    return y


def _pairs(x: Tensor, R: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return views of the first and of the second dimensions of the pairs."""
    if interleaved:
        return x[..., 0 : 2 * R : 2], x[..., 1 : 2 * R : 2]
    return x[..., :R], x[..., R : 2 * R]
