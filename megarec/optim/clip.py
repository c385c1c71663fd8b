"""Global-norm gradient clipping over sharded gradients."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the L2 norm of all gradients over all ranks, a scalar; the same on every rank."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(model: nn.Module, norm: float, max_norm: float) -> None:
    """Scale all gradients by max_norm / norm where their norm exceeds max_norm."""
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, torch.tensor(norm))
