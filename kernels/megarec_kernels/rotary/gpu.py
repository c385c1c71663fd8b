"""Rotary positions on a GPU: one Triton kernel behind one torch op, whose backward it is, too."""

from typing import Any

import torch
from torch import Tensor

TILE = 1024
"""Pairs of a program, at least."""


def rotary_gpu(x: Tensor, rotation: Tensor, interleaved: bool) -> Tensor:
    """Return x turned; arguments as in rotary."""
    return _turn(x, rotation, interleaved, False)


@torch.library.custom_op("megarec::rotary", mutates_args=())
def _turn(x_BTHK: Tensor, rotation: Tensor, interleaved: bool, back: bool) -> Tensor:
    """Return x turned, or turned back: by the opposite angles."""
    from megarec_kernels.rotary import gpu_kernels
    from megarec_kernels.triton_tools import triton_dtype

    (B, T, H, K), R = x_BTHK.shape, rotation.shape[-1]
    y_BTHK = x_BTHK.new_empty(x_BTHK.shape)
    # Read in place: it is often a slice of a wider projection.
    x_BTHK = x_BTHK if x_BTHK.stride(-1) == 1 else x_BTHK.contiguous()
    rotation = rotation.contiguous()
    own_angles = rotation.numel() > 2 * T * R  # of each row
    block_R = _power_of_2(R)
    block_N = max(1, TILE // block_R)
    with torch.accelerator.device_index(x_BTHK.device.index):
        gpu_kernels.turn_kernel[(-(-B * T * H // block_N),)](
            x_BTHK,
            rotation,
            y_BTHK,
            B * T * H,
            T,
            H,
            *x_BTHK.stride()[:3],
            T * R if own_angles else 0,
            rotation.stride(0),
            K=K,
            R=R,
            INTERLEAVED=interleaved,
            BACK=back,
            WIDE=triton_dtype(rotation.dtype),
            BLOCK_N=block_N,
            BLOCK_R=block_R,
            BLOCK_REST=_power_of_2(K - 2 * R),
        )
    return y_BTHK


def _power_of_2(size: int) -> int:
    """Return the smallest that is not below the size."""
    return 1 << max(0, size - 1).bit_length()


@_turn.register_fake
def _(x_BTHK: Tensor, rotation: Tensor, interleaved: bool, back: bool) -> Tensor:
    return x_BTHK.new_empty(x_BTHK.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, bool, bool], output: Tensor) -> None:
    _, rotation, ctx.interleaved, ctx.back = inputs
    ctx.save_for_backward(rotation)


def _differentiate(ctx: Any, dy_BTHK: Tensor) -> tuple[Tensor, None, None, None]:
    (rotation,) = ctx.saved_tensors
    return _turn(dy_BTHK, rotation, ctx.interleaved, not ctx.back), None, None, None


_turn.register_autograd(_differentiate, setup_context=_save)
