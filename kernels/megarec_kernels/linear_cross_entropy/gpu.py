"""Cross-entropy of a linear head on a GPU: matmuls of a chunk of tokens, and one Triton kernel.

The kernel turns logits into losses and, in their place, gradients: a chunk's logits are all that
is held beside the results.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
) -> Tensor:
    """Return the loss sum; arguments as in linear_cross_entropy."""
    options = (ignore_index, soft_cap, z_loss)
    with_grad = torch.is_grad_enabled()
    return _chunked(x_ND, weight_VD, weights_N, labels_N, options, chunk_size, with_grad)


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
            weights_C = None if weights_N is None else weights_N[rows]
            gradient = x_grad or weight_grad
            losses_N[rows] = _rows(logits_CV, labels_N[rows], weights_C, *options, gradient)
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
        return *scaled_gradients(ctx, dloss), *[None] * 4


_chunked: Callable[..., Tensor] = _Chunked.apply


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
    from megarec_kernels.linear_cross_entropy.gpu_kernels import row_kernel
    from megarec_kernels.triton_tools import triton, triton_dtype

    C, V = logits_CV.shape
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    losses_C = logits_CV.new_empty(C, dtype=dtype)
    with torch.accelerator.device_index(logits_CV.device.index):
        row_kernel[(C,)](
            logits_CV,
            labels_C.contiguous(),
            None if weights_C is None else weights_C.contiguous(),
            losses_C,
            V,
            IGNORE=ignore_index,
            CAP=soft_cap,
            Z_LOSS=z_loss,
            GRADIENT=gradient,
            WIDE=triton_dtype(dtype),
            BLOCK_V=min(BLOCK_V, triton.next_power_of_2(V)),
            num_warps=8,
        )
    return losses_C


@_rows.register_fake
def _(logits_CV: Tensor, *_: Any) -> Tensor:
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    return logits_CV.new_empty(logits_CV.shape[:1], dtype=dtype)
