"""Attention by torch's scaled_dot_product_attention, which picks a fused kernel where it can."""

from torch import Tensor
from torch.nn import functional as F

from megarec_kernels.attention.masks import find_documents, visible


def attention_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    resets: Tensor | None,
    num_cached: Tensor | None,
    window: int | None,
    scale: float,
) -> Tensor:
    """Return y; arguments as in attention."""
    T, S = q.shape[1], k.shape[1]
    # A lone query sees the whole of a cache that counts; a whole sequence is plainly causal.
    plain = resets is None and num_cached is None and (window is None or window >= S)
    mask_B1TS, causal = None, False
    if plain and (T == 1 or S == T):
        causal = T > 1
    else:
        mask_B1TS = visible(*find_documents(resets, num_cached, q, k), window)[:, None]
    y_BHTV = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask_B1TS,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y_BHTV.transpose(1, 2)
