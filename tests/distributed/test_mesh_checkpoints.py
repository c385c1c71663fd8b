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

Mesh = tuple[int, Parallel]
"""Number of ranks, and how they are used."""

ALONE: Mesh = (1, {})
ZBV: Mesh = (2, {"pp": 2, "pp_schedule": "zbv"})
PP, TP, FSDP = (2, {"pp": 2}), (2, {"tp": 2}), (2, {})
PP_TP, FSDP_TP, TP4 = (4, {"pp": 2, "tp": 2}), (4, {"tp": 2}), (4, {"tp": 4})
HSDP, EIGHT = (4, {"dp_replicate": 2}), (8, {"pp": 2, "tp": 2})
PAIRS: dict[str, tuple[str, Mesh, Mesh]] = {
    "zbv and alone": ("mlstm", ZBV, ALONE),
    "tied, pipeline and alone": ("tied", PP, ALONE),
    "looped, pipeline and alone": ("looped", PP, ALONE),
    "tensors and alone": ("hybrid", TP, ALONE),
    "pipeline of tensors and FSDP": ("para_gru", PP_TP, FSDP),
    "tied, sharded tensors and pipeline": ("tied", FSDP_TP, PP),
    "four ways and two ways": ("para_gru", TP4, TP),
    "HSDP and tensors": ("looped", HSDP, TP),
    "all three and alone": ("hybrid", EIGHT, ALONE),
}
# Name -> model, the mesh that saves, the mesh that loads.
CROSSINGS = PAIRS | {f"{name}, back": (m, b, a) for name, (m, a, b) in PAIRS.items()}

Held = dict[str, tuple[dict[str, Tensor], float]]
"""Crossing -> all tensors that a rank has of it, and its part of the next loss."""


def manager(folder: str, name: str) -> CheckpointManager:
    return CheckpointManager(Path(folder) / name, CheckpointConfig())


def whole(run: Run) -> dict[str, Tensor]:
    return {
        key: (x.full_tensor() if isinstance(x, DTensor) else x).clone()
        for key, x in run.tensors().items()
    }


def save(rank: int, world_size: int, folder: str) -> Held:
    """Save after a step, all that ranks of this number save."""
    held = {}
    for name, (model, (size, parallel), _) in CROSSINGS.items():
        if size == world_size:
            run = Run(rank, world_size, model, parallel)
            run.step(0)
            manager(folder, name).save(1, run.tensors(), {})
            held[name] = whole(run), run.step(1)[0]
    return held


def load(rank: int, world_size: int, folder: str) -> Held:
    """Load all that ranks of this number load."""
    held = {}
    for name, (model, _, (size, parallel)) in CROSSINGS.items():
        if size == world_size:
            run = Run(rank, world_size, model, parallel)
            manager(folder, name).load(Path(folder) / name / "step_00000001", run.tensors())
            held[name] = whole(run), run.step(1)[0]
    return held


@pytest.fixture(scope="module")
def crossings(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, list[Held]]]:
    """What was saved, then what was loaded, by the number of ranks."""
    folder = str(tmp_path_factory.mktemp("crossings"))
    return [{size: run_ranks(do, size, folder) for size in (1, 2, 4, 8)} for do in (save, load)]


@pytest.mark.parametrize("name", CROSSINGS)
def test_a_checkpoint_crosses(name: str, crossings: Any) -> None:
    _, (source, _), (target, _) = CROSSINGS[name]
    before, after = (
        [held[name] for held in done[size]]
        for done, size in zip(crossings, (source, target), strict=True)
    )
    saved, found = (
        {k: x for held, _ in ranks for k, x in held.items()} for ranks in (before, after)
    )
    assert saved.keys() == found.keys()
    assert all(torch.equal(found[key], x) for key, x in saved.items())
    loss = sum(part for _, part in before)
    assert sum(part for _, part in after) == pytest.approx(loss, rel=1e-6)
