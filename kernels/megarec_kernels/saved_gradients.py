"""Losses whose forward computes the gradients, so that the backward only scales them."""

from typing import Any

from torch import Tensor


def save_gradients(ctx: Any, *pairs: tuple[Tensor | None, Tensor | None]) -> None:
    """Keep gradients for a loss gradient of 1, each with its input; they may be wider than it."""
    ctx.save_for_backward(*(gradient for gradient, _ in pairs))
    ctx.dtypes = [None if of is None else of.dtype for _, of in pairs]


def scaled_gradients(ctx: Any, dloss: Tensor) -> list[Tensor | None]:
    """Return the gradients, in the dtypes of the inputs."""
    return [
        None if gradient is None else (gradient * dloss).to(dtype)
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
