"""A looped stack under FSDP2: equal to one process, and what goes over the wire."""

from collections import Counter
from typing import Any

import pytest
import torch
from looped_models import POISSON, looped_tree
from small import run_config
from torch.utils._python_dispatch import TorchDispatchMode

from megarec.config.schema import Config
from megarec.models import Backbone, build_model
from megarec.models.context import Context, Draw
from megarec.optim.build import build_optimizer, set_learning_rate
from megarec.optim.clip import gradient_norm
from megarec.parallel.apply import build_sharded_model, release_core
from megarec.parallel.mesh import build_mesh
from megarec.testing.distributed import run_ranks

ROWS, TOKENS, STEPS = 4, 12, 5
LAYOUTS: dict[str, dict[str, Any]] = {
    "held": {},
    "held, recurrences recomputed": {"activation_checkpointing": "recurrence"},
    "gathered anew": {"hold_core": False},
    "replicated": {"dp_replicate": 2, "dp_shard": 1},
}


class Collectives(TorchDispatchMode):
    """Counts all-gathers and reduce-scatters."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name in ("allgather", "reduce_scatter"):
            self.counts[name] += str(func).startswith(f"c10d._{name}")
        return func(*args, **(kwargs or {}))


def recipe(parallel: dict[str, Any]) -> Config:
    stack = {"depth": POISSON, "backprop": 2, "update": {"type": "gated"}}
    model = looped_tree(**stack)
    model["blocks"]["m"] = {"mixer": {"type": "mlstm", "num_heads": 2, "chunk_size": 4}}
    model["pattern"] = ["b", "m", "b", "b"]
    return run_config(model=model, parallel=parallel)


def train(
    model: Backbone, config: Config, rank: int = 0, world_size: int = 1
) -> list[tuple[float, float, float]]:
    """Train for some steps; returns this rank's loss, the gradient norm, and the recurrences."""
    optimizer, found = build_optimizer(model, config.optimizer), []
    model.train()
    rows = torch.arange(ROWS)[rank * ROWS // world_size : (rank + 1) * ROWS // world_size]
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(61, (ROWS, TOKENS), generator=generator)[rows]
        draw = Draw(config.seed, step, step, rows)
        loss, _ = model(ids, ids, ctx=Context(draw=draw))
        (loss * world_size / (ROWS * TOKENS)).backward()
        release_core(model, config)
        recurrences = model.metrics()["loop/recurrences"]
        found.append((loss.item(), gradient_norm(model).item(), recurrences))
        set_learning_rate(optimizer, 1e-2)
        optimizer.step()
        optimizer.zero_grad()
    return found


def cases(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, parallel in LAYOUTS.items():
        config = recipe(parallel)
        mesh = build_mesh(config.parallel, world_size, "cpu")
        model = build_sharded_model(config, mesh, torch.device("cpu")).model
        results[name] = train(model, config, rank, world_size)
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
        with Collectives() as wire:
            model(ids, ids, num_recurrences=8)[0].backward()
            release_core(model, config)
        results[f"{name}: wire"] = dict(wire.counts)
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(cases, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_one_process(layout: str, ranks: list[dict[str, Any]]) -> None:
    config = recipe({})
    expected = train(build_model(config.model, seed=config.seed), config)
    assert len({recurrences for _, _, recurrences in expected}) > 2
    for step, (loss, norm, recurrences) in enumerate(expected):
        ours = [rank[layout][step] for rank in ranks]
        tolerance = 1e-6 if step == 0 else 1e-5
        assert sum(part for part, _, _ in ours) == pytest.approx(loss, rel=tolerance)
        assert [norm for _, norm, _ in ours] == pytest.approx([norm, norm], rel=10 * tolerance)
        assert {r for _, _, r in ours} == {recurrences}


def test_a_held_core_is_gathered_once(ranks: list[dict[str, Any]]) -> None:
    # Units: prelude, coda (each gathered again in backward), the core and the root.
    for layout in ("held", "held, recurrences recomputed"):
        assert ranks[0][f"{layout}: wire"] == {"allgather": 2 + 2 + 1 + 1, "reduce_scatter": 4}
    # Each block of the core: once a recurrence forward, and once more for each on the way back;
    # FSDP2 may prefetch it for a recurrence that has no way back.
    anew = ranks[0]["gathered anew: wire"]
    assert anew["allgather"] - (2 + 2 + 1 + 2 * (8 + 2)) in (0, 1)
    assert anew["reduce_scatter"] == 5
