"""The optimizer of a model: what decays, learning-rate factors by name, and what is frozen."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from megarec.config.schema import OptimizerConfig
from megarec.errors import UserError
from megarec.optim.ellis_adam import ELLISAdam


def is_decayed(name: str, parameter: nn.Parameter, *, embeddings: bool = False) -> bool:
    """Tell whether weight decay applies: to matrices, but not to biases, nor as a rule embeddings.

    Norm scales, most biases and per-head parameters are vectors (the mask of xLSTM 7B,
    arXiv 2503.13427; with `embeddings` that of Huginn, 2502.05171). A tied head is the embedding.
    """
    is_bias, is_embedding = name.split(".")[-1] == "bias", name.endswith("embedding.weight")
    return parameter.ndim >= 2 and not is_bias and (embeddings or not is_embedding)


def learning_rate_scales(names: Iterable[str], config: OptimizerConfig) -> dict[str, float]:
    """Return each parameter's factor on the learning rate, by name.

    Raises:
        UserError: a glob of `lr_scale` that matches no parameter.
    """
    names = list(names)
    idle = [glob for glob in config.lr_scale if not any(fnmatchcase(n, glob) for n in names)]
    if idle:
        raise UserError(
            *(
                f"optimizer.lr_scale: '{glob}' matches no parameter; names look like '{names[-1]}'"
                for glob in idle
            )
        )
    return {name: learning_rate_scale(name, config) for name in names}


def learning_rate_scale(name: str, config: OptimizerConfig) -> float:
    """Return one parameter's factor on the learning rate: that of the first glob that matches."""
    return next((s for glob, s in config.lr_scale.items() if fnmatchcase(name, glob)), 1.0)


def freeze(model: nn.Module, config: OptimizerConfig) -> None:
    """Take parameters whose factor is 0 out of training (UserError as learning_rate_scales)."""
    parameters = dict(model.named_parameters())
    for name, scale in learning_rate_scales(parameters, config).items():
        parameters[name].requires_grad_(scale > 0)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer over the final (sharded) parameters that train, at its peak lr.

    The model may be a part of one: globs of `lr_scale` that match nothing are for `freeze` to find.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decayed = is_decayed(name, parameter, embeddings=config.decay_embeddings)
        scale = learning_rate_scale(name, config)
        groups.setdefault((decayed, scale), []).append(parameter)
    param_groups = [
        {
            "params": members,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "lr": config.lr * scale,
            "lr_scale": scale,
        }
        for (decayed, scale), members in groups.items()
    ]
    if config.type == "ellis_adam":
        return ELLISAdam(param_groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(param_groups, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, by the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
