"""Affine recurrence in two levels of about sqrt(T) steps, with its backward written out.

All blocks of L tokens walk their tokens at once from a zero state, which gives each token's h and
the product P of the matrices so far; then one walk over the blocks hands the states on; then every
token adds P times the state at the start of its block.

Shape suffixes: B batch, T time, K slots, D channels; N blocks; C columns, which are h and those of
P; X = N B D, innermost, so that every operation is long even where channels are few. A matrix is
K x K a channel or, where the slots are each by themselves, its diagonal: a dim less.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

UNROLLED = 4
"""Up to this many slots a product is a sum of elementwise ones; beyond, a matmul a channel."""


def affine_scan_eager(A: Tensor, b_BTKD: Tensor, state_BKD: Tensor) -> Tensor:
    """Return h (B, T, K, D); A is (B, T, K, D) or (B, T, K, K, D)."""
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
        db_BTKD, dstate_BKD = adjoint(A, dh_BTKD)
        before_BTKD = torch.cat([state_BKD[:, None], h_BTKD[:, :-1]], 1)
        if A.dim() == before_BTKD.dim():
            return db_BTKD * before_BTKD, db_BTKD, dstate_BKD
        return db_BTKD[..., :, None, :] * before_BTKD[..., None, :, :], db_BTKD, dstate_BKD


_scan: Callable[[Tensor, Tensor, Tensor], Tensor] = _Scan.apply


def adjoint(A: Tensor, g_BTKD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of b (B, T, K, D) and of the state (B, K, D) if g is that of h.

    They are l_t = g_t + A_{t+1}^T l_{t+1}, and A_0^T l_0.
    """
    T = g_BTKD.shape[1]
    transposed = A if A.dim() == g_BTKD.dim() else A.transpose(2, 3)
    # The matrix after each token, the last token first; it starts from zero, whatever its matrix.
    after = (T - torch.arange(T, device=A.device)) % T
    zero_BKD = torch.zeros_like(g_BTKD[:, 0])
    l_BTKD = scan(transposed.index_select(1, after), g_BTKD.flip(1), zero_BKD).flip(1)
    if A.dim() == g_BTKD.dim():
        return l_BTKD, A[:, 0] * l_BTKD[:, 0]
    return l_BTKD, torch.einsum("bijd,bid->bjd", A[:, 0], l_BTKD[:, 0])


def scan(A: Tensor, b_BTKD: Tensor, state_BKD: Tensor) -> Tensor:
    """Return h (B, T, K, D), without a gradient."""
    B, T, K, D = b_BTKD.shape
    # A power of 2 near sqrt(T), so that sequences of usual lengths need no padding.
    L = 2 ** ((T.bit_length() - 1) // 2)
    N = math.ceil(T / L)
    A_LX, b_LKX = _blocks(A, N, L), _blocks(b_BTKD, N, L)

    # One product moves h and P on, side by side.
    M_LKCX = b_LKX.new_zeros(L, K, 1 + A_LX[0, 0].numel() // b_LKX[0, 0].numel(), N * B * D)
    h_LKX, P_LX = M_LKCX[:, :, 0], M_LKCX[:, :, 1:].view_as(A_LX)
    h_LKX.copy_(b_LKX)
    P_LX[0] = A_LX[0]
    for t in range(1, L):
        _add_product(M_LKCX[t], A_LX[t], M_LKCX[t - 1])

    starts_NKCX = torch.empty(N, K, 1, B * D, dtype=A.dtype, device=A.device)
    starts_NKCX[0] = state_BKD.transpose(0, 1).reshape(K, 1, B * D)
    starts_NKCX[1:] = h_LKX[-1].view(K, 1, N, B * D).movedim(2, 0)[:-1]
    P_NX = P_LX[-1].unflatten(-1, (N, B * D)).movedim(-2, 0)
    for n in range(1, N):
        _add_product(starts_NKCX[n], P_NX[n - 1], starts_NKCX[n - 1])
    _add_product(M_LKCX[:, :, :1], P_LX, starts_NKCX.movedim(0, 2).reshape(K, 1, N * B * D))
    h_LKNBD = h_LKX.view(L, K, N, B, D)
    return h_LKNBD.permute(3, 2, 0, 1, 4).reshape(B, N * L, K, D)[:, :T]


def _blocks(x: Tensor, N: int, L: int) -> Tensor:
    """Return x (B, T, ..., D) as (L, ..., X); zeros fill up the last block."""
    T = x.shape[1]
    if T < N * L:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, N * L - T))
    x = x.unflatten(1, (N, L))
    return x.movedim((2, 1, 0), (0, -3, -2)).flatten(-3)


def _add_product(out_KCX: Tensor, A: Tensor, M_KCX: Tensor) -> None:
    """Add A M to out in place; A is (K, X) or (K, K, X); any leading dims."""
    K = out_KCX.shape[-3]
    if A.dim() < out_KCX.dim():
        out_KCX.addcmul_(A[..., None, :], M_KCX)
    elif K > UNROLLED:
        out_KCX += torch.einsum("...ijx,...jcx->...icx", A, M_KCX)
    else:
        for k in range(K):
            out_KCX.addcmul_(A[..., k, None, :], M_KCX[..., k : k + 1, :, :])
