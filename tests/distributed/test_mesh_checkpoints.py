"""Checkpoints cross from any mesh to any other: bitwise, and training goes on as it would have."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_runs import Parallel, Run
from torch import Tensor
from torch.distributed.tensor import DTensor

from megarec.checkpoint.manager import CheckpointManager
from megarec.config.schema import CheckpointConfig
from megarec.testing.distributed import run_ranks

ALONE: tuple[int, Parallel] = (1, {})
ZBV = (2, {"pp": 2, "pp_schedule": "zbv"})
PP, TP, FSDP = (2, {"pp": 2}), (2, {"tp": 2}), (2, {})
PP_TP, FSDP_TP, TP4 = (4, {"pp": 2, "tp": 2}), (4, {"tp": 2}), (4, {"tp": 4})
HSDP, EIGHT = (4, {"dp_replicate": 2}), (8, {"pp": 2, "tp": 2})
CROSSINGS = {
    "zbv and alone": ("mlstm", ZBV, ALONE),
    "tied: pipeline and alone": ("tied", PP, ALONE),
    "looped: pipeline and alone": ("looped", PP, ALONE),
    "tensors and alone": ("hybrid", TP, ALONE),
    "pipeline of tensors and FSDP": ("para_gru", PP_TP, FSDP),
    "tied: sharded tensors and pipeline": ("tied", FSDP_TP, PP),
    "four ways and two ways": ("para_gru", TP4, TP),
    "HSDP and tensors": ("looped", HSDP, TP),
    "all three and alone": ("hybrid", EIGHT, ALONE),
}


def manager(folder: str) -> CheckpointManager:
    return CheckpointManager(Path(folder), CheckpointConfig())


def whole(run: Run) -> dict[str, Tensor]:
    return {
        key: (x.full_tensor() if isinstance(x, DTensor) else x).clone()
        for key, x in run.tensors().items()
    }


def save(
    rank: int, world_size: int, folder: str, model: str, parallel: Parallel
) -> tuple[dict[str, Tensor], float]:
    """Save after a step; returns what was saved, and this rank's part of the next loss."""
    run = Run(rank, world_size, model, parallel)
    run.step(0)
    manager(folder).save(1, run.tensors(), {})
    return whole(run), run.step(1)[0]


def load(
    rank: int, world_size: int, folder: str, model: str, parallel: Parallel
) -> tuple[dict[str, Tensor], float]:
    """Load; returns the same as `save`."""
    run = Run(rank, world_size, model, parallel)
    manager(folder).load(Path(folder) / "step_00000001", run.tensors())
    return whole(run), run.step(1)[0]


def joined(ranks: list[tuple[dict[str, Tensor], float]]) -> dict[str, Tensor]:
    return {key: x for held, _ in ranks for key, x in held.items()}


@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
@pytest.mark.parametrize("name", CROSSINGS)
def test_a_checkpoint_crosses(name: str, back: bool, tmp_path: Path) -> None:
    model, *meshes = CROSSINGS[name]
    (ranks, source), (other_ranks, target) = reversed(meshes) if back else meshes
    saved = run_ranks(save, ranks, str(tmp_path), model, source, timeout=200)
    found = run_ranks(load, other_ranks, str(tmp_path), model, target, timeout=200)
    before, after = joined(saved), joined(found)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], x) for key, x in before.items())
    loss: Any = sum(part for _, part in saved)
    assert sum(part for _, part in found) == pytest.approx(loss, rel=1e-6)
