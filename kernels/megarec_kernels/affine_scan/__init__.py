"""Affine recurrences h_t = A_t h_{t-1} + b_t, forward or backward in time."""

import torch
from torch import Tensor

from megarec_kernels.affine_scan.eager import affine_scan_eager
from megarec_kernels.affine_scan.reference import affine_scan_reference
from megarec_kernels.dispatch import choose_backend

__all__ = ["affine_scan"]

FORMS = {"reference": affine_scan_reference, "eager": affine_scan_eager}


def affine_scan(
    A: Tensor,
    b: Tensor,
    *,
    state: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return h_t = A_t h_{t-1} + b_t for every t; with ``reverse``, h_t = A_t h_{t+1} + b_t.

    A state has K slots in each of D channels; channels do not mix. The engine of `newton_rnn`
    (arXiv 2510.21450, eq. 2.4) and of diagonal linear recurrences.

    Args:
        A: (B, T, K, D), each slot by itself, or (B, T, K, K, D): row, column, channel.
        b: (B, T, K, D), dtype of A.
        state: (B, K, D), h before the first token (after the last with ``reverse``); None is 0.
        resets: (B, T) bool. True at t sets A_t to 0: h_t = b_t, exactly.
        reverse: Run from the last token to the first.
        backend: "auto", "reference" or "eager"; MEGAREC_KERNELS overrides it.

    Returns:
        h (B, T, K, D) in b's dtype; all is computed in promote_types(b.dtype, float32).

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    _check(A, b, state, resets)
    dtype = torch.promote_types(b.dtype, torch.float32)
    A_BTKKD, b_BTKD = A.to(dtype), b.to(dtype)
    B, _, K, D = b.shape
    state_BKD = b_BTKD.new_zeros(B, K, D) if state is None else state.to(dtype)
    if resets is not None:
        A_BTKKD = A_BTKKD.masked_fill(resets.view(*resets.shape, *[1] * (A.dim() - 2)), 0)
    form = FORMS[choose_backend("affine_scan", backend)]
    if not reverse:
        return form(A_BTKKD, b_BTKD, state_BKD).to(b.dtype)
    return form(A_BTKKD.flip(1), b_BTKD.flip(1), state_BKD).flip(1).to(b.dtype)


def _check(A: Tensor, b: Tensor, state: Tensor | None, resets: Tensor | None) -> None:
    if b.dim() != 4 or b.shape[1] == 0:
        _fail("b", f"shape {tuple(b.shape)}", "(B, T, K, D) with at least one token")
    if not b.is_floating_point():
        _fail("b", str(b.dtype), "a float dtype")
    B, T, K, D = b.shape
    if A.shape not in ((B, T, K, D), (B, T, K, K, D)):
        _fail("A", f"shape {tuple(A.shape)}", f"{(B, T, K, D)} or {(B, T, K, K, D)}")
    if A.dtype != b.dtype:
        _fail("A", str(A.dtype), f"the dtype of b, {b.dtype}")
    if state is not None and state.shape != (B, K, D):
        _fail("state", f"shape {tuple(state.shape)}", f"{(B, K, D)}")
    if resets is not None and (resets.shape != (B, T) or resets.dtype != torch.bool):
        _fail("resets", f"{resets.dtype} {tuple(resets.shape)}", f"torch.bool {(B, T)}")


def _fail(argument: str, got: str, expected: str) -> None:
    raise ValueError(f"affine_scan: {argument}: got {got}, expected {expected}")
