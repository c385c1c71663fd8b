"""Cross-entropy of a linear head, a chunk of tokens at a time, gradients in the forward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megarec_kernels.linear_cross_entropy.vocabulary import VocabularyPart
from megarec_kernels.saved_gradients import save_gradients, scaled_gradients


def linear_cross_entropy_eager(
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
    """Return the loss sum; arguments as in linear_cross_entropy."""
    with_grad = torch.is_grad_enabled()
    return _chunked(
        x_ND,
        weight_VD,
        weights_N,
        labels_N,
        soft_cap,
        z_loss,
        ignore_index,
        chunk_size,
        vocabulary,
        with_grad,
    )


class _Chunked(torch.autograd.Function):
    """The loss sum; the forward saves the gradients of its inputs for a loss gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        weights_N: Tensor | None,
        labels_N: Tensor,
        soft_cap: float | None,
        z_loss: float,
        ignore_index: int,
        chunk_size: int,
        vocabulary: VocabularyPart | None,
        with_grad: bool,
    ) -> Tensor:
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        x_grad, weight_grad, weights_grad = (
            with_grad and needed for needed in ctx.needs_input_grad[:3]
        )
        dx_ND = torch.empty_like(x_ND) if x_grad else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=dtype) if weight_grad else None
        dweights_N = torch.empty_like(weights_N) if weights_N is not None and weights_grad else None
        loss = x_ND.new_zeros((), dtype=dtype)
        for start in range(0, x_ND.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            x_CD, labels_C1 = x_ND[rows], labels_N[rows, None]
            kept_C1 = labels_C1 != ignore_index
            here_C1 = kept_C1
            if vocabulary is not None:
                labels_C1 = labels_C1 - vocabulary.first
                here_C1 = kept_C1 & (labels_C1 >= 0) & (labels_C1 < weight_VD.shape[0])
            labels_C1 = labels_C1.where(here_C1, 0)

            logits_CV = (x_CD @ weight_VD.T).to(dtype)
            tanh_CV = None
            if soft_cap is not None:
                # 2 sigmoid(2a) - 1 is tanh(a), and on CPU several times faster than torch.tanh.
                tanh_CV = logits_CV.mul_(2 / soft_cap).sigmoid_().mul_(2).sub_(1)
                logits_CV = tanh_CV * soft_cap
            max_C1 = logits_CV.amax(-1, keepdim=True)
            label_logits_C1 = logits_CV.gather(1, labels_C1)
            if vocabulary is not None:
                max_C1 = vocabulary.largest(max_C1)
            exp_CV = logits_CV.sub_(max_C1).exp_()
            sum_C1 = exp_CV.sum(-1, keepdim=True)
            if vocabulary is not None:
                label_logits_C1.masked_fill_(~here_C1, 0)
                sum_C1, label_logits_C1 = vocabulary.add(torch.stack([sum_C1, label_logits_C1]))
            lse_C1 = max_C1 + sum_C1.log()
            loss_C1 = lse_C1 - label_logits_C1 + z_loss * lse_C1.square()
            loss_C1.masked_fill_(~kept_C1, 0)
            if dweights_N is not None:
                dweights_N[rows] = loss_C1[:, 0]
            scale_C1 = kept_C1
            if weights_N is not None:
                scale_C1 = kept_C1 * weights_N[rows, None].to(dtype)
                loss_C1 *= scale_C1
            loss += loss_C1.sum()
            if dx_ND is None and dweight_VD is None:
                continue

            dlogits_CV = exp_CV.mul_((1 + 2 * z_loss * lse_C1) * scale_C1 / sum_C1)
            dlogits_CV.scatter_add_(1, labels_C1, -(here_C1 * scale_C1).to(dtype))
            if tanh_CV is not None:
                dlogits_CV.mul_(tanh_CV.square_().neg_().add_(1))
            dlogits_CV = dlogits_CV.to(x_ND.dtype)
            if dx_ND is not None:
                torch.mm(dlogits_CV, weight_VD, out=dx_ND[rows])
            if dweight_VD is not None:
                dweight_VD += dlogits_CV.T @ x_CD
        save_gradients(ctx, (dx_ND, x_ND), (dweight_VD, weight_VD), (dweights_N, weights_N))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, dloss), *[None] * 7


_chunked: Callable[..., Tensor] = _Chunked.apply
