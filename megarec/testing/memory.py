"""Count the bytes of tensors on the CPU by kind, over the forward, backward and step of a model."""

import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megarec.optim.clip import local_shard

FSDP = "torch.distributed.fsdp"


@dataclass(frozen=True)
class Memory:
    """Bytes of this process, each storage counted once.

    Attributes:
        parameters: of the model: what this rank holds of them.
        gradients: of those, after the backward pass.
        optimizer: states that are as large as a parameter.
        gathered: the most that FSDP holds at one time: gathered parameters, and gradients that it
            reduces, but not before it is given them.
        activations: what the forward pass made that the backward pass needs.
        peak: the most that was alive at one time of all that forward and backward pass made, but
            for what FSDP made.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    peak: int


def measure(
    model: nn.Module,
    forward: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    after_backward: Callable[[], None] = lambda: None,
) -> Memory:
    """Run forward, backward and, if there is one, the optimizer, and return what they hold.

    Args:
        model: on the CPU; its gradients are removed first. Under FSDP it has not run yet: what it
            gathers into must be new.
        forward: runs the model and returns a tensor; what else it makes it must let go.
        optimizer: of the model's parameters.
        after_backward: what has to follow a backward pass.
    """
    model.zero_grad(set_to_none=True)
    held = [local_shard(parameter) for parameter in model.parameters()]
    with LiveBytes() as live:
        result = forward()
        activations = live.bytes() - result.untyped_storage().nbytes()
        result.sum().backward()
        after_backward()
    parameters = list(model.parameters())
    gradients = [local_shard(p.grad) for p in parameters if p.grad is not None]
    states: list[Tensor] = []
    if optimizer is not None:
        optimizer.step()
        per_parameter = [optimizer.state[parameter].values() for parameter in parameters]
        states = [local_shard(x) for values in per_parameter for x in values if _is_large(x)]
    return Memory(
        parameters=num_bytes(held),
        gradients=num_bytes(gradients),
        optimizer=num_bytes(states),
        gathered=live.peak_of_fsdp,
        activations=activations,
        peak=live.peak,
    )


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' elements."""
    return sum(x.numel() * x.element_size() for x in tensors)


class LiveBytes(TorchDispatchMode):
    """Watches the storages that operations make, and what is left of them.

    `peak` is the largest sum of those that were alive after an operation, `peak_of_fsdp` that of
    those that FSDP made, which are kept apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.peak_of_fsdp = 0
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], bool]] = {}

    def bytes(self, of_fsdp: bool = False) -> int:
        """Return the bytes that are alive, of what FSDP made or of what all others did."""
        total = 0
        for storage_id, (reference, made_by_fsdp) in list(self._alive.items()):
            storage = reference()
            if storage is None:
                del self._alive[storage_id]
            elif made_by_fsdp == of_fsdp:
                total += storage.nbytes()
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the storages that are new in its results."""
        given = {storage._cdata for storage in _storages((args, kwargs))}
        results = func(*args, **(kwargs or {}))
        for storage in _storages(results):
            if storage._cdata not in given:
                self._alive[id(storage)] = weakref.ref(storage), _fsdp_calls()
        self.peak = max(self.peak, self.bytes())
        self.peak_of_fsdp = max(self.peak_of_fsdp, self.bytes(of_fsdp=True))
        return results


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
    return [local_shard(x).untyped_storage() for x in tensors]


def _fsdp_calls() -> bool:
    """Whether FSDP is among the callers. (Its hooks run beside the model, not around it.)"""
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        if caller.f_globals.get("__name__", "").startswith(FSDP):
            return True
        frame = caller
    return False


def _is_large(state: Any) -> bool:
    # AdamW counts its steps in a tensor, too.
    return isinstance(state, Tensor) and state.dim() > 0
