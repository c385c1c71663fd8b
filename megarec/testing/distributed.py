"""Run a function on several gloo ranks of this machine and return what each of them returns.

    def cases(rank: int, world_size: int, width: int) -> dict[str, torch.Tensor]:
        total = torch.full((width,), float(rank))
        dist.all_reduce(total)
        return {"total": total}

    def test_all_reduce():
        for result in run_ranks(cases, 2, 4):
            assert result["total"].tolist() == [1.0] * 4

The first call of a test session costs some seconds, the others about a tenth of one. Everything
runs on the CPU, with one thread a rank.
"""

import importlib.util
import inspect
import io
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

# A server imports torch once and forks the ranks, which saves seconds each. It must not have run
# any torch operation, and it has not.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "megarec.testing.distributed",
        "megarec.config.schema",
        "torch._dynamo",  # what the first step of an optimizer imports
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
    ]
)


class RankFailed(RuntimeError):
    """A rank raised, died or did not end in time; the message has its traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 500.0
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on each rank and return the results by rank.

    `function` stands at the top level of any file, a test file too; a result is made of tensors,
    numbers, strings, lists, tuples and dicts. In it the gloo process group is up, RANK, LOCAL_RANK
    and WORLD_SIZE are set, and the environment is the caller's.

    Raises RankFailed on the first failure, or after `timeout` seconds; no process is left then.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes: list[ForkServerProcess] = []
        pipes: dict[Connection, int] = {}
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_run_rank,
                args=(sender, rank, world_size, folder, timeout, dict(os.environ)),
                kwargs={"source": _source(function), "args": args},
                daemon=True,
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes[receiver] = rank
        try:
            return _collect(pipes, processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(
    pipes: dict[Connection, int], processes: list[ForkServerProcess], deadline: float
) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(processes):
        waiting = [pipe for pipe, rank in pipes.items() if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = ", ".join(str(pipes[pipe]) for pipe in waiting)
            raise RankFailed(f"ranks {missing} did not end in time")
        for pipe in waiting:
            if pipe not in ready:
                continue
            rank = pipes[pipe]
            try:
                failure, payload = pipe.recv()
            except EOFError:
                failure = "it died"
            if failure:
                raise _explain(rank, failure, processes)
            results[rank] = torch.load(io.BytesIO(payload), weights_only=True)
    return [results[rank] for rank in range(len(processes))]


def _explain(rank: int, failure: str, processes: list[ForkServerProcess]) -> RankFailed:
    # A rank that died takes the others' connections with it: it is the cause.
    wait([process.sentinel for process in processes], timeout=0.2)
    for other, process in enumerate(processes):
        if process.exitcode:
            return RankFailed(f"rank {other} died with exit code {process.exitcode}")
    return RankFailed(f"rank {rank} failed:\n{failure}")


def _run_rank(
    pipe: Connection,
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    environment: dict[str, str],
    *,
    source: tuple[str, str, str],
    args: tuple[Any, ...],
) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = _find(source)(rank, world_size, *args)
        payload = io.BytesIO()
        torch.save(result, payload)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        pipe.send((traceback.format_exc(), b""))
        # The caller ends all ranks; were this one to leave first, the others would fail too and
        # might be reported in its place.
        threading.Event().wait()
    pipe.send(("", payload.getvalue()))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _source(function: Callable[..., Any]) -> tuple[str, str, str]:
    return function.__module__, inspect.getfile(function), function.__qualname__


def _find(source: tuple[str, str, str]) -> Callable[..., Any]:
    # By file: pytest imports test files under names that no other process can import.
    name, file, function = source
    module: ModuleType | None = sys.modules.get(name)
    if module is None or getattr(module, "__file__", None) != file:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file}: not a Python file")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    found: Callable[..., Any] = getattr(module, function)
    return found
