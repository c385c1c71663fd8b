"""ELLISAdam, the optimizer of Huginn: Adam that needs no eps and clips each tensor's update."""

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.optim.optimizer import ParamsT

from megarec.optim.clip import local_shard


class ELLISAdam(torch.optim.Optimizer):
    """Adam with atan2 and update clipping, its moments starting at the first gradient.

    With m = g and v = g^2 before the first update, each update t = 1, 2, ... of a tensor is

        m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  rms = sqrt(mean(g^2 / max(v, eps^2)))
        p = (1 - wd lr / lr0) p
        p = p - lr / max(rms, 1) / (1 - b1^t) atan2(m, sqrt(v / (1 - b2^t)))

    (arXiv 2502.05171; atan2 as in 2407.05872, clipping as in AdaFactor, 1804.04235). lr0 is the
    group's `initial_lr`, by default the lr that it is added with: weight decay follows the
    schedule, but not the size of the learning rate. The mean is over the whole tensor, however a
    DTensor is sharded. Tensors of one group and layout share a reduction, so all ranks must have
    gradients of the same parameters.

    Args:
        params: parameters or groups of them, as for any torch optimizer.
        lr: the peak learning rate.
        betas: b1, b2.
        eps: bounds sqrt(v) from below, in the clipping only.
        weight_decay: wd, the part of a weight that one update at the peak learning rate takes.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its learning rate is the peak unless it has an `initial_lr`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("initial_lr", group["lr"])

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            layouts: dict[Hashable, dict[Tensor, Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    layouts.setdefault(_layout(parameter), {})[parameter] = parameter.grad
            for gradients in layouts.values():
                self._update(gradients, group)

    def _update(self, gradients: dict[Tensor, Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one layout, given with their gradients."""
        parameters = list(gradients)
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros(())  # On the CPU, where reading it costs nothing.
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)

        beta1, beta2 = group["betas"]
        ps, gs = [local_shard(p) for p in parameters], [local_shard(g) for g in gradients.values()]
        ms = [local_shard(state["exp_avg"]) for state in states]
        vs = [local_shard(state["exp_avg_sq"]) for state in states]
        for g, m, v, state in zip(gs, ms, vs, states, strict=True):
            if state["step"] == 0:
                m.copy_(g)
                v.copy_(g).mul_(g)
            state["step"] += 1
        torch._foreach_lerp_(ms, gs, 1 - beta1)
        torch._foreach_mul_(vs, beta2)
        torch._foreach_addcmul_(vs, gs, gs, 1 - beta2)

        # A tensor at a time where the results are new tensors: they need little memory then.
        norms = []
        for parameter, g, v in zip(parameters, gs, vs, strict=True):
            ratio = v.sqrt().clamp_min_(group["eps"]).reciprocal_().mul_(g)
            norms.append(torch.linalg.vector_norm(ratio) / math.sqrt(parameter.numel()))
        clips = _sum_of_shards(torch.stack(norms).square(), parameters[0]).sqrt().clamp_min(1)

        if group["weight_decay"]:
            decay = group["weight_decay"] * (group["lr"] / group["initial_lr"])
            torch._foreach_mul_(ps, 1 - decay)
        for p, m, v, clip, state in zip(ps, ms, vs, clips, states, strict=True):
            t = int(state["step"])
            root = v.sqrt().div_(math.sqrt(1 - beta2**t))
            direction = torch.atan2(m, root, out=root)
            p.addcdiv_(direction, clip, value=-group["lr"] / (1 - beta1**t))


def _layout(tensor: Tensor) -> Hashable:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def _sum_of_shards(parts: Tensor, like: Tensor) -> Tensor:
    """Add up numbers that belong to this rank's shards of tensors distributed as `like`."""
    if not isinstance(like, DTensor):
        return parts
    placements = [Replicate() if p.is_replicate() else Partial() for p in like.placements]
    return DTensor.from_local(parts, like.device_mesh, placements).full_tensor()
