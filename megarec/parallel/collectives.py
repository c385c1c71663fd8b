"""Collectives that autograd passes through, each the other's backward."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

# The functional forms, which selective recomputation can keep the results of.
_ops = torch.ops._c10d_functional


def gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Join the ranks' parts along a dim, in order; gradients are added up over the ranks."""
    return cast(Tensor, _Gather.apply(x, dim, group))


def reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Add tensors up over the ranks; each keeps its part of a dim, which their number divides."""
    return cast(Tensor, _ReduceScatter.apply(x, dim, group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(dy, ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _gather(dy, ctx.dim, ctx.group), None, None


def _gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    size = group.size()
    y = _ops.all_gather_into_tensor(x.contiguous(), size, group.group_name)
    # Parts come one after the other along the first dim.
    return torch.cat(_ops.wait_tensor(y).chunk(size), dim)


def _reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    size = group.size()
    x = torch.cat(x.chunk(size, dim))
    y = _ops.reduce_scatter_tensor(x, "sum", size, group.group_name)
    return cast(Tensor, _ops.wait_tensor(y))
