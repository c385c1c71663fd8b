"""Causal depthwise convolution: each channel's last K tokens, weighted."""

from typing import Literal

import torch
from torch import Tensor

from megarec_kernels.causal_conv1d.eager import causal_conv1d_eager
from megarec_kernels.causal_conv1d.gpu import causal_conv1d_gpu, gpu_problem
from megarec_kernels.causal_conv1d.reference import causal_conv1d_reference
from megarec_kernels.dispatch import choose_backend

__all__ = ["causal_conv1d"]

FORMS = {
    "reference": causal_conv1d_reference,
    "eager": causal_conv1d_eager,
    "gpu": causal_conv1d_gpu,
}


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    tail: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return y_t = act(bias + sum_j weight[:, K - 1 - j] x_{t-j}), j from 0 to K - 1.

    The short convolution before the recurrence of Mamba (arXiv 2312.00752) and others. What lies
    before a document counts as 0. All is computed in promote_types(x.dtype, float32).

    Args:
        x: (B, T, C), any float dtype.
        weight: (C, K); the last column is the weight of the present token.
        bias: (C,), or None.
        resets: (B, T) bool, True where a document starts: nothing before it is seen, exactly.
        tail: (B, K - 1, C), the inputs before the first token, oldest first; None means zeros.
        activation: "silu", or None for the plain sum.
        backend: "auto", "reference", "eager" or "gpu" (Triton, for K up to 8); MEGAREC_KERNELS
            overrides it.

    Returns:
        y (B, T, C) in x's dtype, and the tail after the last token, (B, K - 1, C) in x's dtype:
        0 where a document has started since.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    _check(x, weight, bias, resets, tail, activation)
    problem = gpu_problem(x, weight)
    fastest = "gpu" if x.is_cuda and problem is None else "eager"
    chosen = choose_backend("causal_conv1d", backend, FORMS, fastest, problem)
    return FORMS[chosen](x, weight, bias, resets, tail, activation)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    resets: Tensor | None,
    tail: Tensor | None,
    activation: str | None,
) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        _fail("x", f"shape {tuple(x.shape)}", "(B, T, C) with at least one token")
    if not x.is_floating_point():
        _fail("x", str(x.dtype), "a float dtype")
    B, T, C = x.shape
    if weight.dim() != 2 or weight.shape[0] != C or weight.shape[1] == 0:
        _fail("weight", f"shape {tuple(weight.shape)}", f"({C}, K) with K at least 1")
    if bias is not None and bias.shape != (C,):
        _fail("bias", f"shape {tuple(bias.shape)}", f"({C},)")
    if resets is not None and (resets.shape != (B, T) or resets.dtype != torch.bool):
        _fail("resets", f"{resets.dtype} {tuple(resets.shape)}", f"torch.bool {(B, T)}")
    expected = (B, weight.shape[1] - 1, C)
    if tail is not None and tail.shape != expected:
        _fail("tail", f"shape {tuple(tail.shape)}", str(expected))
    if activation not in (None, "silu"):
        _fail("activation", repr(activation), "'silu' or None")


def _fail(argument: str, got: str, expected: str) -> None:
    raise ValueError(f"causal_conv1d: {argument}: got {got}, expected {expected}")
