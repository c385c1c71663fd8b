"""Losses whose forward computes the gradients, so that the backward only scales them."""

from typing import Any

from torch import Tensor


def save_gradients(ctx: Any, dx: Tensor | None, dweight: Tensor | None, weight: Tensor) -> None:
    """Keep the gradients for a loss gradient of 1; `dweight` may be wider than the weight."""
    ctx.save_for_backward(dx, dweight)
    ctx.weight_dtype = weight.dtype


def scaled_gradients(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and weight."""
    dx, dweight = ctx.saved_tensors
    if dx is not None:
        dx = dx * dloss
    if dweight is not None:
        dweight = (dweight * dloss).to(ctx.weight_dtype)
    return dx, dweight
