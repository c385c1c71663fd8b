"""Attention one query at a time over the keys that it sees; nothing is masked, keys are picked."""

import torch
from torch import Tensor


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    resets: Tensor | None,
    num_cached: Tensor | None,
    window: int | None,
    scale: float,
) -> Tensor:
    """Return y; arguments as in attention."""
    B, T, H, _ = q.shape
    cached = k.shape[1] - T
    dtype = torch.promote_types(q.dtype, torch.float32)
    k_BSHK = k.to(dtype).repeat_interleave(H // k.shape[2], 2)
    v_BSHV = v.to(dtype).repeat_interleave(H // v.shape[2], 2)
    rows = []
    for b in range(B):
        first = 0 if num_cached is None else max(0, cached - int(num_cached[b]))
        ys_HV = []
        for t in range(T):
            if resets is not None and resets[b, t]:
                first = cached + t
            last = cached + t
            oldest = first if window is None else max(first, last - window + 1)
            keys = slice(oldest, last + 1)
            scores_HS = scale * torch.einsum("hk,shk->hs", q[b, t].to(dtype), k_BSHK[b, keys])
            ys_HV.append(torch.einsum("hs,shv->hv", scores_HS.softmax(-1), v_BSHV[b, keys]))
        rows.append(torch.stack(ys_HV))
    return torch.stack(rows).to(v.dtype)
