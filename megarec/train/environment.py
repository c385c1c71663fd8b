"""The processes of a run: rank, device, and the few collectives that the trainer needs."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megarec.device import backend_for, select_device
from megarec.errors import UserError


@dataclass(frozen=True)
class Environment:
    """This process among those of the run; `start` it under torchrun or plain python."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    @contextmanager
    def start(cls, device: str, timeout_seconds: float) -> Iterator["Environment"]:
        """Join the process group (gloo, or nccl on GPUs) and leave it at the end.

        A group that the caller has set up already is used, and left to the caller.

        Raises:
            UserError: no such device, or the other processes could not be reached.
        """
        here = select_device(device)
        joined = not dist.is_initialized()
        if joined:
            _join(here, timedelta(seconds=timeout_seconds))
        try:
            yield cls(dist.get_rank(), dist.get_world_size(), here)
        finally:
            if joined:
                dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up numbers over all ranks, in float64; every rank gets the same bits."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Return the largest of each number over all ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers, operation)
        return numbers.tolist()

    def ranks_where(self, flag: bool) -> list[int]:
        """Return the ranks whose flag is set, on every rank."""
        flags = [0.0] * self.world_size
        flags[self.rank] = float(flag)
        return [rank for rank, value in enumerate(self.sum(flags)) if value]


def _join(device: torch.device, timeout: timedelta) -> None:
    gpu = device if device.type == "cuda" else None
    if "RANK" not in os.environ:
        store = torch.distributed.HashStore()
        dist.init_process_group(
            backend_for(device), store=store, rank=0, world_size=1, timeout=timeout, device_id=gpu
        )
        return
    try:
        dist.init_process_group(backend_for(device), timeout=timeout, device_id=gpu)
    except dist.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE')} on "
            f"{socket.gethostname()} could not join the others at {address}: "
            f"{str(error).splitlines()[0]}"
        ) from error
