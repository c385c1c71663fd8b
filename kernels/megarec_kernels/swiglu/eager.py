"""SwiGLU's activation in plain PyTorch; autograd alone would keep silu(gate), too."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu_eager(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up; arguments as in swiglu."""
    return _swiglu(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)


_swiglu: Callable[[Tensor, Tensor], Tensor] = _SwiGLU.apply
