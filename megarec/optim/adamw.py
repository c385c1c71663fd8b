"""AdamW with the weight-decay mask."""

import torch
from torch import nn

from megarec.config.schema import OptimizerConfig


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether weight decay applies: to matrices, but not to embeddings.

    Norm scales, biases and per-head parameters are vectors (the mask of xLSTM 7B,
    arXiv 2503.13427).
    """
    return parameter.ndim >= 2 and not name.startswith("embedding.")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over the model's final (sharded) parameters, fused where torch has it."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if is_decayed(name, parameter) else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
