"""Causal depthwise convolution on a GPU: Triton kernels behind two torch ops, forward and backward.

Gradients of weights are summed in a fixed order, without atomics: a run repeats bit by bit.
"""

from typing import Any

import torch
from torch import Tensor

from megarec_kernels.dispatch import triton_problem

MAX_KERNEL = 8
"""K up to which the weights and tokens of a program stay in registers."""

SEGMENT, BLOCK_C, NUM_WARPS = 128, 128, 2


def gpu_problem(x: Tensor, weight: Tensor) -> str | None:
    """Return why the kernels cannot take these inputs, or None where they can."""
    if weight.shape[1] > MAX_KERNEL:
        return f"the kernels take K up to {MAX_KERNEL}, got {weight.shape[1]}; use 'eager'"
    return triton_problem(x)


def causal_conv1d_gpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    resets: Tensor | None,
    tail: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """Return y and the tail; arguments as in causal_conv1d."""
    tail = None if tail is None else tail.to(x.dtype)
    return _convolve(x, weight, bias, resets, tail, activation == "silu")


@torch.library.custom_op("megarec::causal_conv1d", mutates_args=())
def _convolve(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    resets_BT: Tensor | None,
    tail_BKC: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    y_BTC, tail_after_BKC = _like_inputs(x_BTC, weight_CK)
    inputs = (x_BTC, weight_CK, bias_C, resets_BT, tail_BKC)
    _launch("forward_kernel", silu, *inputs, y_BTC, tail_after_BKC)
    return y_BTC, tail_after_BKC


@torch.library.custom_op("megarec::causal_conv1d_backward", mutates_args=())
def _gradients(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    resets_BT: Tensor | None,
    tail_BKC: Tensor | None,
    silu: bool,
    dy_BTC: Tensor,
    dtail_after_BKC: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and tail; of weights in the computation's dtype."""
    dx_BTC, dtail_BKC = _like_inputs(x_BTC, weight_CK)
    (B, T, C), K = x_BTC.shape, weight_CK.shape[1]
    dtype = torch.promote_types(x_BTC.dtype, torch.float32)
    sums_PKC = x_BTC.new_empty(B * _num_segments(T), K + 1, C, dtype=dtype)
    inputs = (x_BTC, weight_CK, bias_C, resets_BT, tail_BKC, dy_BTC, dtail_after_BKC)
    _launch("backward_kernel", silu, *inputs, dx_BTC, dtail_BKC, sums_PKC)
    return dx_BTC, sums_PKC[:, :K].sum(0).T.contiguous(), sums_PKC[:, K].sum(0), dtail_BKC


def _launch(name: str, silu: bool, x: Tensor, weight: Tensor, *others: Tensor | None) -> None:
    from megarec_kernels.causal_conv1d import gpu_kernels
    from megarec_kernels.triton_tools import triton_dtype

    (B, T, C), K = x.shape, weight.shape[1]
    with torch.accelerator.device_index(x.device.index):
        getattr(gpu_kernels, name)[B * _num_segments(T), -(-C // BLOCK_C)](
            *(None if tensor is None else tensor.contiguous() for tensor in (x, weight, *others)),
            T,
            C,
            K=K,
            SILU=silu,
            WIDE=triton_dtype(torch.promote_types(x.dtype, torch.float32)),
            SEGMENT=SEGMENT,
            BLOCK_C=BLOCK_C,
            num_warps=NUM_WARPS,
        )


def _num_segments(T: int) -> int:
    return -(-T // SEGMENT)


def _like_inputs(x_BTC: Tensor, weight_CK: Tensor) -> tuple[Tensor, Tensor]:
    B, T, C = x_BTC.shape
    return x_BTC.new_empty(B, T, C), x_BTC.new_empty(B, weight_CK.shape[1] - 1, C)


@_convolve.register_fake
def _(x_BTC: Tensor, weight_CK: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like_inputs(x_BTC, weight_CK)


@_gradients.register_fake
def _(x_BTC: Tensor, weight_CK: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x_BTC.dtype, torch.float32)
    dx_BTC, dtail_BKC = _like_inputs(x_BTC, weight_CK)
    dweight_CK = x_BTC.new_empty(weight_CK.shape, dtype=dtype)
    return dx_BTC, dweight_CK, x_BTC.new_empty(weight_CK.shape[:1], dtype=dtype), dtail_BKC


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy_BTC: Tensor, dtail_after_BKC: Tensor) -> tuple[Any, ...]:
    x_BTC, weight_CK, bias_C, resets_BT, tail_BKC = ctx.saved_tensors
    dx_BTC, dweight_CK, dbias_C, dtail_BKC = _gradients(
        x_BTC, weight_CK, bias_C, resets_BT, tail_BKC, ctx.silu, dy_BTC, dtail_after_BKC
    )
    return (
        dx_BTC,
        dweight_CK.to(weight_CK.dtype),
        None if bias_C is None else dbias_C.to(bias_C.dtype),
        None,
        None if tail_BKC is None else dtail_BKC,
        None,
    )


_convolve.register_autograd(_differentiate, setup_context=_save)
