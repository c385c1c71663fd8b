"""Cross-entropy of a linear head from all logits at once, differentiated by autograd."""

import torch
from torch import Tensor

from megarec_kernels.linear_cross_entropy.vocabulary import VocabularyPart


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
    vocabulary: VocabularyPart | None,
) -> Tensor:
    """Return the loss sum; arguments as in linear_cross_entropy. ``chunk_size`` has no effect."""
    kept_N = labels_N != ignore_index
    logits_NV = (x_ND[kept_N] @ weight_VD.T).to(torch.promote_types(x_ND.dtype, torch.float32))
    if soft_cap is not None:
        logits_NV = soft_cap * torch.tanh(logits_NV / soft_cap)
    labels_N1 = labels_N[kept_N, None]
    if vocabulary is None:
        lse_N = logits_NV.logsumexp(-1)
        label_logits_N = logits_NV.gather(1, labels_N1)[:, 0]
    else:
        lse_N, label_logits_N = _over_ranks(logits_NV, labels_N1 - vocabulary.first, vocabulary)
    loss_N = lse_N - label_logits_N + z_loss * lse_N.square()
    return (loss_N if weights_N is None else loss_N * weights_N[kept_N]).sum()


def _over_ranks(
    logits_NV: Tensor, labels_N1: Tensor, vocabulary: VocabularyPart
) -> tuple[Tensor, Tensor]:
    """Return logsumexp and the label's logit (N,), differentiable in this rank's logits."""

    def total(x: Tensor) -> Tensor:
        # The value is that of all ranks, the gradient that of this one's part.
        return x + (vocabulary.add(x.detach().clone()) - x.detach())

    max_N1 = vocabulary.largest(logits_NV.detach().amax(-1, keepdim=True))
    lse_N = max_N1[:, 0] + total((logits_NV - max_N1).exp().sum(-1)).log()
    here_N1 = (labels_N1 >= 0) & (labels_N1 < logits_NV.shape[1])
    label_logits_N1 = logits_NV.gather(1, labels_N1.where(here_N1, 0)).where(here_N1, 0)
    return lse_N, total(label_logits_N1[:, 0])
