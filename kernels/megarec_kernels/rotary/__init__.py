"""Rotary positions: pairs of a head's dimensions turn, which keeps nothing but the angles."""

import torch
from torch import Tensor

from megarec_kernels.dispatch import choose_backend, triton_problem
from megarec_kernels.rotary.eager import rotary_eager
from megarec_kernels.rotary.gpu import rotary_gpu
from megarec_kernels.rotary.reference import rotary_reference

__all__ = ["rotary"]

FORMS = {"reference": rotary_reference, "eager": rotary_eager, "gpu": rotary_gpu}


def rotary(
    x_BTHK: Tensor, rotation: Tensor, *, interleaved: bool = False, backend: str = "auto"
) -> Tensor:
    """Return y with (y_a, y_b) = (x_a cos - x_b sin, x_b cos + x_a sin) for each pair (a, b).

    RoPE (arXiv 2104.09864, eq. 34). Of R pairs, pair r is dimensions r and R + r, or `interleaved`
    2r and 2r + 1; the dimensions from 2R on stay as they are, bit by bit. The backward turns by the
    opposite angles. All is computed in promote_types(x.dtype, float32) and rounded once.

    Args:
        x_BTHK: queries or keys (B, T, H, K), any float dtype and strides.
        rotation: cos and sin of the angles, (2, T, 1, R), (2, 1, T, 1, R) or, where rows differ in
            their positions, (2, B, T, 1, R), in the dtype of the computation. They may have a
            factor. No gradient flows to them.
        interleaved: pairs are neighbours.
        backend: "auto", "reference", "eager" or "gpu" (Triton); MEGAREC_KERNELS overrides it.

    Returns:
        (B, T, H, K) in x's dtype, contiguous.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    _check(x_BTHK, rotation)
    problem = triton_problem(x_BTHK)
    fastest = "gpu" if x_BTHK.is_cuda and problem is None else "eager"
    form = FORMS[choose_backend("rotary", backend, FORMS, fastest, problem)]
    return form(x_BTHK, rotation, interleaved)


def _check(x: Tensor, rotation: Tensor) -> None:
    if x.dim() != 4:
        _fail("x_BTHK", f"shape {tuple(x.shape)}", "(B, T, H, K)")
    if not x.is_floating_point():
        _fail("x_BTHK", str(x.dtype), "a float dtype")
    B, T, _, K = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    if rotation.dtype != dtype:
        _fail("rotation", str(rotation.dtype), f"{dtype}, as x_BTHK is {x.dtype}")
    R = rotation.shape[-1] if rotation.dim() else 0
    if rotation.shape not in ((2, T, 1, R), (2, 1, T, 1, R), (2, B, T, 1, R)):
        shapes = f"(2, {T}, 1, R), (2, 1, {T}, 1, R) or (2, {B}, {T}, 1, R)"
        _fail("rotation", f"shape {tuple(rotation.shape)}", shapes)
    if not 1 <= R <= K // 2:
        _fail("rotation", f"{R} pairs", f"1 to {K // 2}, as a head has {K} dimensions")
    if rotation.requires_grad:
        _fail("rotation", "one that requires a gradient", "none, as there is none: detach() it")


def _fail(argument: str, got: str, expected: str) -> None:
    raise ValueError(f"rotary: {argument}: got {got}, expected {expected}")
