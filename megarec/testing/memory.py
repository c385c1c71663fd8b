"""Count the bytes of tensors on the CPU by kind, over the forward, backward and step of a model."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megarec.optim.clip import local_shard


@dataclass(frozen=True)
class Memory:
    """Bytes of this process, each storage counted once.

    Attributes:
        parameters: of the model: what this rank holds of them.
        gradients: of those, after the backward pass.
        optimizer: states that are as large as a parameter.
        gathered: whole parameters that FSDP holds from the forward to the backward pass.
        activations: what else the forward pass made that the backward pass needs.
        peak: the most that was alive at one time of all that forward and backward pass made.
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
) -> Memory:
    """Run forward, backward and, if there is one, the optimizer, and return what they hold.

    Args:
        model: on the CPU; its gradients are removed first.
        forward: runs the model and returns a tensor; what else it makes it must let go.
        optimizer: of the model's parameters.
    """
    model.zero_grad(set_to_none=True)
    held = [local_shard(parameter) for parameter in model.parameters()]
    with LiveBytes() as live:
        result = forward()
        # FSDP puts the whole parameters in place of its shards as long as it holds them.
        whole = _storages(local_shard(parameter) for parameter in model.parameters())
        gathered = live.bytes(only=whole)
        activations = live.bytes() - gathered - result.untyped_storage().nbytes()
        result.sum().backward()
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
        gathered=gathered,
        activations=activations,
        peak=live.peak,
    )


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' elements."""
    return sum(x.numel() * x.element_size() for x in tensors)


class LiveBytes(TorchDispatchMode):
    """Watches the storages that operations make, and what is left of them.

    `peak` is the largest sum of those that were alive after an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def bytes(self, only: set[int] | None = None) -> int:
        """Return the bytes that are alive, of all or of some storages (see `_storages`)."""
        total = 0
        for storage_id, reference in list(self._alive.items()):
            storage = reference()
            if storage is None:
                del self._alive[storage_id]
            elif only is None or storage._cdata in only:
                total += storage.nbytes()
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the storages that are new in its results."""
        given = _storages(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and not isinstance(x, DTensor):
                storage = x.untyped_storage()
                if storage._cdata not in given:
                    self._alive[id(storage)] = weakref.ref(storage)
        self.peak = max(self.peak, self.bytes())
        return results


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {x.untyped_storage()._cdata for x in tensors if not isinstance(x, DTensor)}


def _is_large(state: Any) -> bool:
    # AdamW counts its steps in a tensor, too.
    return isinstance(state, Tensor) and state.dim() > 0
