"""Distillation loss from all logits at once, differentiated by autograd."""

import torch
from torch import Tensor


def linear_distillation_reference(
    x_ND: Tensor,
    weight_VD: Tensor,
    teacher_x_NE: Tensor,
    teacher_weight_VE: Tensor,
    labels_N: Tensor,
    *,
    reverse: bool,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
    soft_cap: float | None,
    teacher_soft_cap: float | None,
    z_loss: float,
    ignore_index: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, divergence and cross-entropy; arguments as in linear_distillation.

    ``chunk_size`` has no effect: all tokens are one chunk.
    """
    kept_N = labels_N != ignore_index
    dtype = torch.promote_types(x_ND.dtype, torch.float32)
    z_NV = capped((x_ND[kept_N] @ weight_VD.T).to(dtype), soft_cap)
    teacher_NV = capped((teacher_x_NE[kept_N] @ teacher_weight_VE.T).to(dtype), teacher_soft_cap)
    q_NV = (z_NV / temperature).log_softmax(-1)
    p_NV = (teacher_NV / temperature).log_softmax(-1)
    kl_NV = q_NV.exp() * (q_NV - p_NV) if reverse else p_NV.exp() * (p_NV - q_NV)
    divergence = kl_NV.sum()
    lse_N = z_NV.logsumexp(-1)
    label_logits_N = z_NV.gather(1, labels_N[kept_N, None])[:, 0]
    cross_entropy = (lse_N - label_logits_N + z_loss * lse_N.square()).sum()
    loss = kl_weight * temperature**2 * divergence + ce_weight * cross_entropy
    return loss, divergence.detach(), cross_entropy.detach()


def capped(logits: Tensor, soft_cap: float | None) -> Tensor:
    """Bound logits smoothly."""
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
