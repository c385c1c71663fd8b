"""Affine recurrence in two levels of about sqrt(T) steps, with its backward written out.

All blocks of L tokens walk their tokens at once from a zero state, which gives each token's h and
the product P of the matrices so far; then one walk over the blocks hands the states on; then every
token adds P times the state at the start of its block. N blocks, B batch, K slots, D channels; A
is (..., K, D) or (..., K, K, D).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

UNROLLED = 4
"""Up to this many slots a product is a sum of elementwise ones; beyond, a matmul a channel."""


class Algebra(NamedTuple):
    """What the scan does with matrices, each slot by itself or K x K a channel."""

    apply: Callable[[Tensor, Tensor], Tensor]
    """A h."""
    compose: Callable[[Tensor, Tensor], Tensor]
    """A P, the matrix that first does P."""
    transpose: Callable[[Tensor], Tensor]
    outer: Callable[[Tensor, Tensor], Tensor]
    """g h^T, as far as A has entries: the gradient of A where g is that of A h."""


def affine_scan_eager(A: Tensor, b_BTKD: Tensor, state_BKD: Tensor) -> Tensor:
    """Return h (B, T, K, D)."""
    return _scan(A, b_BTKD, state_BKD)


class _Scan(torch.autograd.Function):
    """h; its gradient is a recurrence with the transposed matrices, backward in time."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, b_BTKD: Tensor, state_BKD: Tensor) -> Tensor:
        h_BTKD = scan(A, b_BTKD, state_BKD)
        ctx.save_for_backward(A, state_BKD, h_BTKD)
        return h_BTKD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh_BTKD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        A, state_BKD, h_BTKD = ctx.saved_tensors
        algebra = algebra_of(A, dh_BTKD)
        db_BTKD = adjoint(A, dh_BTKD)
        before_BTKD = torch.cat([state_BKD[:, None], h_BTKD[:, :-1]], 1)
        dstate_BKD = algebra.apply(algebra.transpose(A[:, 0]), db_BTKD[:, 0])
        return algebra.outer(db_BTKD, before_BTKD), db_BTKD, dstate_BKD


_scan: Callable[[Tensor, Tensor, Tensor], Tensor] = _Scan.apply


def adjoint(A: Tensor, g_BTKD: Tensor) -> Tensor:
    """Return l_t = g_t + A_{t+1}^T l_{t+1}, (B, T, K, D): the gradient of b if g is that of h."""
    following = algebra_of(A, g_BTKD).transpose(A[:, 1:])
    following = torch.cat([following, torch.zeros_like(A[:, :1])], 1)
    return scan(following.flip(1), g_BTKD.flip(1), torch.zeros_like(g_BTKD[:, 0])).flip(1)


def scan(A: Tensor, b_BTKD: Tensor, state_BKD: Tensor) -> Tensor:
    """Return h (B, T, K, D), without a gradient."""
    algebra = algebra_of(A, b_BTKD)
    T = b_BTKD.shape[1]
    L = math.ceil(math.sqrt(T))
    N = math.ceil(T / L)
    A_LNB, b_LNBKD = _blocks(A, N, L), _blocks(b_BTKD, N, L)

    h_LNBKD, P_LNB = torch.empty_like(b_LNBKD), torch.empty_like(A_LNB)
    h_LNBKD[0], P_LNB[0] = b_LNBKD[0], A_LNB[0]
    for t in range(1, L):
        h_LNBKD[t] = algebra.apply(A_LNB[t], h_LNBKD[t - 1]) + b_LNBKD[t]
        P_LNB[t] = algebra.compose(A_LNB[t], P_LNB[t - 1])
    states_BKD = [state_BKD]
    for n in range(N - 1):
        states_BKD.append(algebra.apply(P_LNB[-1, n], states_BKD[-1]) + h_LNBKD[-1, n])
    h_LNBKD += algebra.apply(P_LNB, torch.stack(states_BKD).expand_as(h_LNBKD))
    return h_LNBKD.permute(2, 1, 0, 3, 4).flatten(1, 2)[:, :T]


def algebra_of(A: Tensor, b: Tensor) -> Algebra:
    """Return what fits A, which has a dim more than b where it holds K x K matrices."""
    return DIAGONAL if A.dim() == b.dim() else BLOCK


def _blocks(x: Tensor, N: int, L: int) -> Tensor:
    """Return (L, N, B, ...), contiguous; zeros fill up the last block."""
    B, T = x.shape[:2]
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, N * L - T))
    blocks = x.view(B, N, L, *x.shape[2:])
    return blocks.permute(2, 1, 0, *range(3, blocks.dim())).contiguous()


def _apply_block(A: Tensor, h: Tensor) -> Tensor:
    if h.shape[-2] > UNROLLED:
        return torch.einsum("...ijd,...jd->...id", A, h)
    y = A[..., 0, :] * h[..., 0:1, :]
    for k in range(1, h.shape[-2]):
        y = torch.addcmul(y, A[..., k, :], h[..., k : k + 1, :])
    return y


def _compose_block(A: Tensor, P: Tensor) -> Tensor:
    if P.shape[-2] > UNROLLED:
        return torch.einsum("...ijd,...jkd->...ikd", A, P)
    return torch.stack([_apply_block(A, P[..., k, :]) for k in range(P.shape[-2])], -2)


DIAGONAL = Algebra(torch.mul, torch.mul, lambda A: A, torch.mul)
BLOCK = Algebra(
    _apply_block,
    _compose_block,
    lambda A: A.transpose(-3, -2),
    lambda g, h: g[..., :, None, :] * h[..., None, :, :],
)
