"""Causal depthwise convolution as a loop over tokens, differentiated by autograd."""

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    resets: Tensor | None,
    tail: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """Return y and the tail; arguments as in causal_conv1d."""
    B, T, C = x.shape
    K = weight.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    tail_BKC = x.new_zeros(B, K - 1, C) if tail is None else tail.to(x.dtype)
    # Once, not a token: gradients add up in the wider dtype.
    weight_CK, bias_C = weight.to(dtype), None if bias is None else bias.to(dtype)
    ys_BC = []
    for t in range(T):
        if resets is not None:
            tail_BKC = torch.where(resets[:, t, None, None], 0.0, tail_BKC)
        seen_BKC = torch.cat([tail_BKC, x[:, t, None]], 1)
        y_BC = torch.einsum("bkc,ck->bc", seen_BKC.to(dtype), weight_CK)
        if bias_C is not None:
            y_BC = y_BC + bias_C
        ys_BC.append(F.silu(y_BC) if activation == "silu" else y_BC)
        tail_BKC = seen_BKC[:, 1:]
    return torch.stack(ys_BC, 1).to(x.dtype), tail_BKC
