"""Norms over groups of channels on a GPU: Triton kernels behind two torch ops.

Nothing is kept for the backward but the inputs: it has each group at once, and so computes its
statistics again. Gradients of weights are summed in a fixed order, without atomics.
"""

from typing import Any

import torch
from torch import Tensor

from megarec_kernels.dispatch import triton_problem

MAX_GROUP = 16384
"""Channels of a group, all of which are in registers."""

TILE = 2048
"""Elements of a program, at least."""
PROGRAMS = 1024
"""Programs of the backward, at most; each sums up the weight's gradient over its rows."""


def gpu_problem(x: Tensor, group_dim: int) -> str | None:
    """Return why the kernels cannot take these inputs, or None where they can."""
    if group_dim > MAX_GROUP:
        return (
            f"the kernels take groups of up to {MAX_GROUP} channels, got {group_dim}; use 'eager'"
        )
    return triton_problem(x)


def grouped_norm_gpu(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    output_gate: Tensor | None,
    group_dim: int,
    center: bool,
    eps: float,
) -> Tensor:
    """Return the norm; arguments as in grouped_norm."""
    return _normalize(x, weight, gate, output_gate, group_dim, center, eps)


@torch.library.custom_op("megarec::grouped_norm", mutates_args=())
def _normalize(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    output_gate: Tensor | None,
    group_dim: int,
    center: bool,
    eps: float,
) -> Tensor:
    y = _empty_result(x, weight, gate)
    num_groups = x.shape[-1] // group_dim
    grid, options = (_num_tiles(x, group_dim), num_groups), (group_dim, center, eps)
    _launch("forward_kernel", grid, options, (x, weight, gate, output_gate), y)
    return y


@torch.library.custom_op("megarec::grouped_norm_backward", mutates_args=())
def _gradients(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    output_gate: Tensor | None,
    group_dim: int,
    center: bool,
    eps: float,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and the gates; empty for what is not there."""
    inputs = (x, weight, gate, output_gate)
    dx, dweight, dgate, doutput_gate = _empty_gradients(*inputs)
    num_groups = x.shape[-1] // group_dim
    num_programs = min(_num_tiles(x, group_dim), -(-PROGRAMS // num_groups))
    dtype = torch.promote_types(dy.dtype, torch.float32)
    sums_PD = x.new_empty(num_programs, x.shape[-1] if weight is not None else 0, dtype=dtype)
    grid, options = (num_programs, num_groups), (group_dim, center, eps)
    _launch("backward_kernel", grid, options, inputs, dy, dx, dgate, doutput_gate, sums_PD)
    if weight is not None:
        dweight = sums_PD.sum(0).to(weight.dtype)
    return dx, dweight, dgate, doutput_gate


def _launch(
    name: str,
    grid: tuple[int, int],
    options: tuple[int, bool, float],
    inputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    *others: Tensor,
) -> None:
    from megarec_kernels.grouped_norm import gpu_kernels
    from megarec_kernels.triton_tools import triton_dtype

    group_dim, center, eps = options
    x, _, gate, _ = inputs
    with torch.accelerator.device_index(x.device.index):
        getattr(gpu_kernels, name)[grid](
            *(None if tensor is None else tensor.contiguous() for tensor in (*inputs, *others)),
            x.numel() // x.shape[-1],
            x.shape[-1] // group_dim,
            GROUP=group_dim,
            CENTER=center,
            EPS=eps,
            WIDE=triton_dtype(
                torch.promote_types((x if gate is None else gate).dtype, torch.float32)
            ),
            BLOCK_N=_rows(group_dim),
            BLOCK_D=_width(group_dim),
            num_warps=max(4, _width(group_dim) // 512),
        )


def _width(group_dim: int) -> int:
    """Return the power of 2 that a group fits into."""
    return 1 << (group_dim - 1).bit_length()


def _rows(group_dim: int) -> int:
    """Return the rows of a tile."""
    return max(1, TILE // _width(group_dim))


def _num_tiles(x: Tensor, group_dim: int) -> int:
    return -(-x.numel() // x.shape[-1] // _rows(group_dim))


def _empty_result(x: Tensor, weight: Tensor | None, gate: Tensor | None) -> Tensor:
    dtype = (x if gate is None else gate).dtype
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _empty_gradients(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    gradients = [
        x.new_empty(0) if other is None else other.new_empty(other.shape) for other in others
    ]
    return x.new_empty(x.shape), *gradients


@_normalize.register_fake
def _(x: Tensor, weight: Tensor | None, gate: Tensor | None, *_: Any) -> Tensor:
    return _empty_result(x, weight, gate)


@_gradients.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _empty_gradients(*arguments[:4])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.group_dim, ctx.center, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    gradients = _gradients(*inputs, ctx.group_dim, ctx.center, ctx.eps, dy)
    present = [None if x is None else dx for x, dx in zip(inputs, gradients, strict=True)]
    return *present, None, None, None


_normalize.register_autograd(_differentiate, setup_context=_save)
