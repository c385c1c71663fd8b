"""Distillation loss a chunk of tokens at a time, gradients in the forward, by autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megarec_kernels.linear_distillation.reference import linear_distillation_reference
from megarec_kernels.saved_gradients import save_gradients, scaled_gradients


def linear_distillation_eager(
    x_ND: Tensor,
    weight_VD: Tensor,
    teacher_x_NE: Tensor,
    teacher_weight_VE: Tensor,
    labels_N: Tensor,
    *,
    chunk_size: int,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, divergence and cross-entropy; arguments as in linear_distillation."""
    with_grad = torch.is_grad_enabled()
    return _chunked(
        x_ND, weight_VD, teacher_x_NE, teacher_weight_VE, labels_N, chunk_size, options, with_grad
    )


class _Chunked(torch.autograd.Function):
    """The three sums; the forward saves the gradients of x and weight for a loss gradient of 1.

    A chunk's graph, and the logits in it, are gone before the next chunk begins.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        teacher_x_NE: Tensor,
        teacher_weight_VE: Tensor,
        labels_N: Tensor,
        chunk_size: int,
        options: dict[str, Any],
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        x_grad, weight_grad = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        dx_ND = torch.empty_like(x_ND) if x_grad else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=dtype) if weight_grad else None
        sums = x_ND.new_zeros(3, dtype=dtype)
        for start in range(0, x_ND.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            leaves = x_ND[rows].detach(), weight_VD.detach()
            with torch.set_grad_enabled(x_grad or weight_grad):
                leaves[0].requires_grad_(x_grad)
                leaves[1].requires_grad_(weight_grad)
                terms = linear_distillation_reference(
                    *leaves,
                    teacher_x_NE[rows],
                    teacher_weight_VE,
                    labels_N[rows],
                    chunk_size=chunk_size,
                    **options,
                )
            sums += torch.stack([term.detach() for term in terms])
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            gradients = list(torch.autograd.grad(terms[0], wanted)) if wanted else []
            if dx_ND is not None:
                dx_ND[rows] = gradients.pop(0)
            if dweight_VD is not None:
                dweight_VD += gradients.pop(0)
        save_gradients(ctx, (dx_ND, x_ND), (dweight_VD, weight_VD))
        loss, divergence, cross_entropy = sums.unbind()
        ctx.mark_non_differentiable(divergence, cross_entropy)
        return loss.clone(), divergence, cross_entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, dloss), *[None] * 6


_chunked: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Chunked.apply
