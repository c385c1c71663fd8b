"""Tensors of any mesh to and from a folder of safetensors, by torch's distributed checkpoint.

DCP's default storage keeps its metadata pickled; the safetensors storage runs no code on reading.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megarec.checkpoint.mismatch import mismatches
from megarec.errors import UserError

MODEL = "model."
OPTIMIZER = "optimizer."


def write(
    folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Write tensors into an existing folder, one fsynced safetensors file a rank.

    Collective over `group` (default: all ranks), or alone where there is no process group. Shards
    of a DTensor are written by their ranks, replicated tensors once.
    Raises UserError on all ranks, a line for each that failed.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _as_user_errors(), _quiet():
        save(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            storage_writer=writer,
            process_group=group,
            no_dist=not dist.is_initialized(),
        )


def read(
    folder: Path,
    tensors: Mapping[str, Tensor],
    group: dist.ProcessGroup | None = None,
    *,
    partial: bool = False,
) -> None:
    """Fill tensors in place from a folder; each rank reads its own shards.

    Collective over `group` (default: all ranks), or alone where there is no process group. Values
    are converted to the dtype of the tensor. `partial` leaves tensors of the folder unread, as
    tools do that want ``model.*`` only.
    The ranks of a pipeline each have some of the tensors.
    Raises UserError, on all ranks before any tensor changes, when names or shapes do not fit.
    """
    stored = {name: shape for name, (shape, _) in describe(folder).items()}
    expected = {name: tensor.shape for name, tensor in tensors.items()}
    if not partial:
        elsewhere = _wanted_elsewhere(stored.keys() - expected.keys(), group)
        stored = {name: shape for name, shape in stored.items() if name not in elsewhere}
    problems = _of_any_rank(mismatches(str(folder), stored, expected, partial=partial), group)
    if problems:
        raise UserError(*problems)
    with _as_user_errors(), _quiet():
        load(
            dict(tensors),
            storage_reader=HuggingFaceStorageReader(str(folder)),
            process_group=group,
            no_dist=not dist.is_initialized(),
        )


def _wanted_elsewhere(unread: Set[str], group: dist.ProcessGroup | None) -> set[str]:
    """Return which of the names that this rank does not read some other rank does."""
    unread_by_all = set(unread)
    for names in _gather(sorted(unread), group):
        unread_by_all &= set(names)
    return set(unread) - unread_by_all


def _of_any_rank(lines: list[str], group: dist.ProcessGroup | None) -> list[str]:
    return list(dict.fromkeys(line for lines_ in _gather(lines, group) for line in lines_))


def _gather(lines: list[str], group: dist.ProcessGroup | None) -> list[list[str]]:
    if not dist.is_initialized():
        return [lines]
    texts: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(texts, json.dumps(lines), group=group)
    return [json.loads(text) for text in texts]


def describe(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the whole shape and the dtype of each tensor in a folder, by name.

    Raises UserError where a file is missing or no safetensors file.
    """
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: cannot be read as safetensors: {error}") from error
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return ``model.<name>`` -> the live parameters and persistent buffers, detached.

    A tensor with two names (tied embeddings) appears under the first. Reading into the result
    changes the model.
    """
    return {MODEL + name: tensor.detach() for tensor, name in _names(model).items()}


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return ``model_tensors`` and ``optimizer.<parameter>.{step, exp_avg, exp_avg_sq}``.

    All are live: reading into the result restores model and optimizer. State that the optimizer
    has not made yet, because it makes it at a parameter's first update, is made here, as zeros.
    Learning rate and the like are not state: they come from the config and the step.
    """
    names = _names(model)
    tensors = {MODEL + name: tensor.detach() for tensor, name in names.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state.update(_initial_state(parameter, group))
            for key, value in state.items():
                tensors[f"{OPTIMIZER}{names[parameter]}.{key}"] = value
    return tensors


def _names(model: nn.Module) -> dict[Tensor, str]:
    # state_dict() and not named_parameters(): it returns FSDP's parameters to their shards, which
    # are what the optimizer holds.
    names: dict[Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, name)
    return names


def _initial_state(parameter: Tensor, group: dict[str, object]) -> dict[str, Tensor]:
    # The step counter is on the CPU, unless AdamW's update runs on the device as a whole.
    on_device = bool(group.get("fused") or group.get("capturable"))
    return {
        "step": torch.zeros((), device=parameter.device if on_device else "cpu"),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    # "assuming the intent is to save in a single process": it is.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _as_user_errors() -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        raise UserError(
            *(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())
        ) from error
