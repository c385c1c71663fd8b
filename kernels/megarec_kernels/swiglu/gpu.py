"""SwiGLU's activation on a GPU: Triton kernels behind two torch ops, forward and backward."""

from typing import Any

import torch
from torch import Tensor

BLOCK = 2048


def swiglu_gpu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up; arguments as in swiglu."""
    return _multiply(gate, up)


@torch.library.custom_op("megarec::swiglu", mutates_args=())
def _multiply(gate: Tensor, up: Tensor) -> Tensor:
    y = gate.new_empty(gate.shape)
    _launch("forward_kernel", gate, up, y)
    return y


@torch.library.custom_op("megarec::swiglu_backward", mutates_args=())
def _gradients(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    _launch("backward_kernel", gate, up, dy, dgate, dup)
    return dgate, dup


def _launch(name: str, gate: Tensor, *others: Tensor) -> None:
    from megarec_kernels.swiglu import gpu_kernels
    from megarec_kernels.triton_tools import triton_dtype

    with torch.accelerator.device_index(gate.device.index):
        getattr(gpu_kernels, name)[(-(-gate.numel() // BLOCK),)](
            *(tensor.contiguous() for tensor in (gate, *others)),
            gate.numel(),
            WIDE=triton_dtype(torch.promote_types(gate.dtype, torch.float32)),
            BLOCK=BLOCK,
        )


@_multiply.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@_gradients.register_fake
def _(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _gradients(*ctx.saved_tensors, dy)


_multiply.register_autograd(_differentiate, setup_context=_save)
