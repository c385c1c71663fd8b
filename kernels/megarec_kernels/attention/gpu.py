"""Attention by torch's flex_attention, which skips the blocks that documents or a window hide."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from megarec_kernels.attention.masks import find_documents


def flex_fits(q: Tensor, v: Tensor) -> bool:
    """Tell whether flex has a fast kernel for these heads: powers of 2, from 16 to 256."""
    return all(16 <= dim <= 256 and dim & (dim - 1) == 0 for dim in (q.shape[-1], v.shape[-1]))


def attention_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    resets: Tensor | None,
    num_cached: Tensor | None,
    window: int | None,
    scale: float,
) -> Tensor:
    """Return y; arguments as in attention.

    Raises ValueError where there is no GPU: uncompiled, flex holds all scores.
    """
    if not q.is_cuda:
        raise ValueError(f"attention: backend='gpu' needs tensors on a GPU, got {q.device}")
    return flex(_compiled(), q, k, v, resets, num_cached, window, scale)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def flex(
    flex_attention: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    resets: Tensor | None,
    num_cached: Tensor | None,
    window: int | None,
    scale: float,
) -> Tensor:
    """Return y by `flex_attention`, compiled or not; arguments as in attention."""
    B, T, H, _ = q.shape
    S, G = k.shape[1:3]
    query_BT, key_BS = find_documents(resets, num_cached, q, k)
    reach = S if window is None else window

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        back = t + (S - T) - s
        return (query_BT[b, t] == key_BS[b, s]) & (back >= 0) & (back < reach)

    y_BHTV = flex_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=create_block_mask(sees, B, None, T, S, device=q.device),
        scale=scale,
        enable_gqa=G != H,
    )
    return y_BHTV.transpose(1, 2)
