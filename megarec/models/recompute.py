"""Run a function again in the backward pass, but for the results of chosen ops, which are kept.

torch's own selective checkpointing asks that both runs make the very same ops. Under FSDP they do
not: a unit inside of the function may be gathered in one of them alone.
"""

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megarec.errors import UserError


@dataclass(frozen=True)
class _Result:
    """A tensor that an op gave, and its version: how often it was written to."""

    tensor: Tensor
    version: int


_Results = dict[OpOverload, deque[Any]]
"""What each op gave, in order: trees of _Result."""


def find_ops(names: Iterable[str]) -> frozenset[OpOverload]:
    """Return torch's ops of these names, `aten` ops or functional collectives.

    Raises:
        UserError: torch has no op of a name.
    """
    found: set[OpOverload] = set()
    for name in names:
        spaces = (torch.ops.aten, torch.ops._c10d_functional)
        packet = next((getattr(space, name) for space in spaces if hasattr(space, name)), None)
        if packet is None:
            raise UserError(
                f"parallel.saved_ops: {name}: torch {torch.__version__} has no such op; expected "
                "the name of an aten op or a functional collective, mm say"
            )
        overloads = [getattr(packet, overload) for overload in packet.overloads()]
        # What writes to its arguments has to run again: they are made anew.
        found |= {op for op in overloads if not op._schema.is_mutable}
    return frozenset(found)


def keeping(ops: frozenset[OpOverload]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return contexts of a run that keeps the results of `ops`, and of the run that uses them.

    It is a `context_fn` of torch.utils.checkpoint. Raises RuntimeError where a kept result was
    written over.
    """
    results: _Results = defaultdict(deque)
    return _Keep(ops, results), _Use(ops, results)


class _Mode(TorchDispatchMode):
    def __init__(self, ops: frozenset[OpOverload], results: _Results) -> None:
        super().__init__()
        self.ops = ops
        self.results = results

    def keeps(self, op: Any) -> bool:
        # An op with a backward of its own runs without autograd. It is computed again as a whole:
        # what its matmuls give is large, and may be written over. What ranks have sent stays.
        is_collective = op.namespace == "_c10d_functional"
        return op in self.ops and (is_collective or torch.is_grad_enabled())


class _Keep(_Mode):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **kwargs or {})
        if self.keeps(op):
            # Detached: the result itself will hold the graph, which holds this.
            kept = tree_map_only(Tensor, lambda x: _Result(x.detach(), x._version), result)
            self.results[op].append(kept)
        return result


class _Use(_Mode):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.keeps(op):
            return op(*args, **kwargs or {})

        def unchanged(result: _Result) -> Tensor:
            if result.tensor._version != result.version:
                raise RuntimeError(
                    f"{op}: its result was kept for the backward pass, but then written over; "
                    "leave the op out of parallel.saved_ops"
                )
            return result.tensor

        if not self.results[op]:
            raise RuntimeError(f"{op}: no result was kept, or a second backward pass asks for it")
        return tree_map_only(_Result, unchanged, self.results[op].popleft())
