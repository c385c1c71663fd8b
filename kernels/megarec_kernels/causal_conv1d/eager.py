"""Causal depthwise convolution as K shifted multiply-adds; on CPU faster than torch's conv1d."""

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv1d_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    resets: Tensor | None,
    tail: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """Return y and the tail; arguments as in causal_conv1d. S is K - 1 + T."""
    B, T, C = x.shape
    K = weight.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    tail_BKC = x.new_zeros(B, K - 1, C) if tail is None else tail.to(x.dtype)
    x_BSC = torch.cat([tail_BKC, x], 1)
    wide_BSC, weight_CK = x_BSC.to(dtype), weight.to(dtype)
    document_BS = None if resets is None else F.pad(resets, (K - 1, 0)).cumsum(1)

    y_BTC = wide_BSC[:, K - 1 :] * weight_CK[:, K - 1]
    for k in range(K - 1):
        seen_BTC = wide_BSC[:, k : k + T]
        if document_BS is not None:
            other_BT = document_BS[:, k : k + T] != document_BS[:, K - 1 :]
            seen_BTC = seen_BTC.masked_fill(other_BT[..., None], 0)
        y_BTC = torch.addcmul(y_BTC, seen_BTC, weight_CK[:, k])
    if bias is not None:
        y_BTC = y_BTC + bias.to(dtype)
    if activation == "silu":
        y_BTC = F.silu(y_BTC)

    tail_BKC = x_BSC[:, T:]
    if document_BS is not None:
        ended_BK = document_BS[:, T:] != document_BS[:, -1:]
        tail_BKC = tail_BKC.masked_fill(ended_BK[..., None], 0)
    # A copy, so that whoever keeps the tail does not keep the whole sequence.
    return y_BTC.to(x.dtype), tail_BKC.clone()
