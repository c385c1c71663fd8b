"""Global-norm gradient clipping over gradients of any mesh."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gradient_norm(model: nn.Module, twins: frozenset[Tensor] = frozenset()) -> Tensor:
    """Return the L2 norm of all gradients over all ranks, a float64 scalar, the same on each.

    Each rank adds up its shards, what is replicated in equal parts; one all-reduce does the rest.

    Args:
        model: or the part of it that is here.
        twins: parameters that are left out since they are another rank's too, which counts them.
    """
    squares, shares = [], []
    for parameter in model.parameters():
        if parameter.grad is not None and parameter not in twins:
            squares.append(local_shard(parameter.grad))
            shares.append(1 / _replicas(parameter.grad))
    if squares:
        norms = torch.stack(torch._foreach_norm(squares)).double()
        total = (norms.square() * norms.new_tensor(shares)).sum()
    else:
        total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.sqrt()


def clip_gradients(model: nn.Module, norm: float, max_norm: float) -> None:
    """Scale all gradients by max_norm / norm where their norm exceeds max_norm."""
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, torch.tensor(norm))


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _replicas(tensor: Tensor) -> int:
    """Return how many ranks hold the same shard."""
    count = 1
    if isinstance(tensor, DTensor):
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            count *= size if placement.is_replicate() else 1
    return count
