"""Work that succeeds on every rank or fails on every rank."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megarec.errors import UserError

T = TypeVar("T")


class Ranks:
    """All ranks over a gloo group of their own, or one process without a process group.

    Its own group, because background threads communicate while training does. Making one is
    collective. Every method is, too.
    """

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo")
            self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """Return each rank's `value` (plain JSON data), in the order of ranks."""
        if self.group is None:
            return [value]
        texts: list[Any] = [None] * self.size
        dist.all_gather_object(texts, json.dumps(value), group=self.group)
        return [json.loads(text) for text in texts]

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank and return this rank's own result.

        Raises UserError on all ranks, with one line per cause, when `work` raised UserError,
        OSError or RuntimeError on any of them: no rank is left waiting.
        """
        errors: list[str] = []
        try:
            result = work()
        except UserError as error:
            errors = list(error.lines)
        except (OSError, RuntimeError) as error:
            errors = [f"rank {self.rank}: {error}"]
        causes = dict.fromkeys(line for lines in self.gather(errors) for line in lines)
        if causes:
            raise UserError(*causes)
        return result

    def agree(self, work: Callable[[], Any]) -> list[Any]:
        """Return each rank's result of `work` (plain JSON data); errors as `together`."""
        return self.gather(self.together(work))

    def first(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 alone and return its result on every rank; errors as `agree`."""
        return self.agree(work if self.rank == 0 else _nothing)[0]


def _nothing() -> None:
    """Stand in for the work of rank 0 on the others."""
