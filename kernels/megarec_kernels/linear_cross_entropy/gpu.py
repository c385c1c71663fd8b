"""Cross-entropy of a linear head on a GPU: matmuls of a chunk of tokens, and one Triton kernel.

The kernel turns logits into losses and, in their place, gradients: a chunk's logits are all that
is held beside the results. Where ranks divide the vocabulary there are two, and in between the
ranks add up what each has of a row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megarec_kernels.linear_cross_entropy.vocabulary import VocabularyPart
from megarec_kernels.saved_gradients import save_gradients, scaled_gradients

BLOCK_V = 4096
"""Logits that a program has in registers."""


def linear_cross_entropy_gpu(
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
    options = (ignore_index, soft_cap, z_loss)
    with_grad = torch.is_grad_enabled()
    return _chunked(
        x_ND, weight_VD, weights_N, labels_N, options, chunk_size, vocabulary, with_grad
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
        options: tuple[int, float | None, float],
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
        losses_N = x_ND.new_empty(x_ND.shape[:1], dtype=dtype)
        for start in range(0, x_ND.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            logits_CV = x_ND[rows] @ weight_VD.T
            labels_C = labels_N[rows]
            weights_C = None if weights_N is None else weights_N[rows]
            gradient = x_grad or weight_grad
            if vocabulary is None:
                losses_C = _rows(logits_CV, labels_C, weights_C, *options, gradient)
            else:
                losses_C = _over_ranks(
                    logits_CV, labels_C, weights_C, options, gradient, vocabulary
                )
            losses_N[rows] = losses_C
            if dx_ND is not None:
                torch.mm(logits_CV, weight_VD, out=dx_ND[rows])
            if dweight_VD is not None:
                dweight_VD += logits_CV.T @ x_ND[rows]
        dweights_N = None
        if weights_N is not None and weights_grad:
            dweights_N = losses_N.to(weights_N.dtype)
        save_gradients(ctx, (dx_ND, x_ND), (dweight_VD, weight_VD), (dweights_N, weights_N))
        return losses_N.sum() if weights_N is None else (losses_N * weights_N.to(dtype)).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, dloss), *[None] * 5


_chunked: Callable[..., Tensor] = _Chunked.apply


def _over_ranks(
    logits_CV: Tensor,
    labels_C: Tensor,
    weights_C: Tensor | None,
    options: tuple[int, float | None, float],
    gradient: bool,
    vocabulary: VocabularyPart,
) -> Tensor:
    """Do what _rows does, with a part of each row's logits here."""
    max_C, sums_2C = _statistics(logits_CV, labels_C, vocabulary.first, options[1])
    largest_C = vocabulary.largest(max_C.clone())
    sums_2C[0] *= (max_C - largest_C).exp()
    sum_C, label_logits_C = vocabulary.add(sums_2C)
    lse_C = largest_C + sum_C.log()
    rows = labels_C, weights_C, lse_C, label_logits_C
    return _part(logits_CV, *rows, vocabulary.first, *options, gradient)


@torch.library.custom_op("megarec::cross_entropy_rows", mutates_args=("logits_CV",))
def _rows(
    logits_CV: Tensor,
    labels_C: Tensor,
    weights_C: Tensor | None,
    ignore_index: int,
    soft_cap: float | None,
    z_loss: float,
    gradient: bool,
) -> Tensor:
    """Return the losses (C,), without weights; with ``gradient`` logits become their gradients."""
    losses_C = _new_wide(logits_CV, logits_CV.shape[0])
    options = {"IGNORE": ignore_index, "Z_LOSS": z_loss, "GRADIENT": gradient}
    rows = labels_C, weights_C, losses_C
    _launch("row_kernel", logits_CV, *rows, logits_CV.shape[1], CAP=soft_cap, **options)
    return losses_C


@torch.library.custom_op("megarec::cross_entropy_statistics", mutates_args=())
def _statistics(
    logits_CV: Tensor, labels_C: Tensor, first: int, soft_cap: float | None
) -> tuple[Tensor, Tensor]:
    """Return the rows' largest logits (C,), and what ranks add up (2, C).

    That is the sum of exp(logit - largest), and the label's logit, 0 where it is not here.
    """
    C, V = logits_CV.shape
    max_C, sums_2C = _new_wide(logits_CV, C), _new_wide(logits_CV, 2, C)
    rows = labels_C, max_C, sums_2C
    _launch("statistics_kernel", logits_CV, *rows, V, first, CAP=soft_cap)
    return max_C, sums_2C


@torch.library.custom_op("megarec::cross_entropy_part", mutates_args=("logits_CV",))
def _part(
    logits_CV: Tensor,
    labels_C: Tensor,
    weights_C: Tensor | None,
    lse_C: Tensor,
    label_logits_C: Tensor,
    first: int,
    ignore_index: int,
    soft_cap: float | None,
    z_loss: float,
    gradient: bool,
) -> Tensor:
    """Do what _rows does, from logsumexp and label's logit over all ranks."""
    losses_C = _new_wide(logits_CV, logits_CV.shape[0])
    options = {"IGNORE": ignore_index, "Z_LOSS": z_loss, "GRADIENT": gradient}
    rows = labels_C, weights_C, lse_C, label_logits_C, losses_C
    _launch("gradient_kernel", logits_CV, *rows, logits_CV.shape[1], first, CAP=soft_cap, **options)
    return losses_C


def _launch(name: str, logits_CV: Tensor, *others: Tensor | int | None, **options: Any) -> None:
    """Run a kernel on rows of logits, which it may overwrite."""
    from megarec_kernels.linear_cross_entropy import gpu_kernels
    from megarec_kernels.triton_tools import triton, triton_dtype

    C, V = logits_CV.shape
    with torch.accelerator.device_index(logits_CV.device.index):
        getattr(gpu_kernels, name)[(C,)](
            logits_CV,
            *(x.contiguous() if isinstance(x, Tensor) else x for x in others),
            **options,
            WIDE=triton_dtype(_wide(logits_CV)),
            BLOCK_V=min(BLOCK_V, triton.next_power_of_2(V)),
            num_warps=8,
        )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _new_wide(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=_wide(x))


@_rows.register_fake
@_part.register_fake
def _(logits_CV: Tensor, *_: Any) -> Tensor:
    return _new_wide(logits_CV, logits_CV.shape[0])


@_statistics.register_fake
def _(logits_CV: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    C = logits_CV.shape[0]
    return _new_wide(logits_CV, C), _new_wide(logits_CV, 2, C)
