"""Cross-entropy of a linear head from all logits at once, differentiated by autograd."""

import torch
from torch import Tensor


def linear_cross_entropy_reference(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    *,
    soft_cap: float | None,
    z_loss: float,
    ignore_index: int,
    chunk_size: int,
) -> Tensor:
    """Return the loss sum; arguments as in linear_cross_entropy. ``chunk_size`` has no effect."""
    kept_N = labels_N != ignore_index
    logits_NV = (x_ND[kept_N] @ weight_VD.T).to(torch.promote_types(x_ND.dtype, torch.float32))
    if soft_cap is not None:
        logits_NV = soft_cap * torch.tanh(logits_NV / soft_cap)
    lse_N = logits_NV.logsumexp(-1)
    label_logits_N = logits_NV.gather(1, labels_N[kept_N, None])[:, 0]
    loss_N = lse_N - label_logits_N + z_loss * lse_N.square()
    return (loss_N if weights_N is None else loss_N * weights_N[kept_N]).sum()
