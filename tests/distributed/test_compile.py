"""Compiled blocks under FSDP2 and in a pipeline: the same losses as without."""

from typing import Any

import pytest
import torch
from small import layers_tree, run_config

from megarec.models.context import Context
from megarec.optim.build import build_optimizer, set_learning_rate
from megarec.parallel.apply import build_sharded_model
from megarec.parallel.mesh import build_mesh
from megarec.testing.distributed import run_ranks
from megarec.train.executor import Direct, Executor, MicroBatch, Pipelined
from megarec.train.objective import next_token

TOKENS, STEPS = 8, 5
MLSTM = {"type": "mlstm", "num_heads": 2, "igate_bias_init": -6.0, "chunk_size": 4}
ATTENTION = {"type": "attention", "num_heads": 2}
CPU = torch.device("cpu")
CASES: dict[str, dict[str, Any]] = {
    # The gates are a unit of FSDP inside of the block, which divides what is compiled.
    "float32 unit, recomputed": {
        "model": layers_tree(MLSTM),
        "precision": {"compute": "bfloat16"},
        "parallel": {"activation_checkpointing": "full"},
    },
    "zero_bubble": {
        "model": layers_tree(ATTENTION, ATTENTION, ATTENTION),
        "parallel": {"pp": 2, "pp_schedule": "zero_bubble"},
    },
}


def losses(rank: int, world_size: int, name: str, compiled: bool) -> list[float]:
    sections = dict(CASES[name])
    parallel = sections.pop("parallel") | {"compile": compiled}
    config = run_config(parallel=parallel, train={"seq_len": TOKENS}, **sections)
    mesh = build_mesh(config.parallel, world_size, "cpu")
    sharded = build_sharded_model(config, mesh, CPU, "aot_eager")
    executor: Executor = (
        Pipelined(sharded, config, CPU) if sharded.stages else Direct(sharded, config, next_token)
    )
    optimizer, found = build_optimizer(sharded.model, config.optimizer), []
    sharded.model.train()
    mine = range(2) if sharded.stages else [rank]
    for step in range(STEPS):
        batches = []
        for i in mine:
            generator = torch.Generator().manual_seed(2 * step + i)
            ids = torch.randint(61, (2, TOKENS), generator=generator)
            resets = torch.zeros(2, TOKENS, dtype=torch.bool)
            resets[:, step] = True
            batches.append(MicroBatch(ids, ids.roll(-1, 1), Context(resets=resets)))
        sums = executor.forward_backward(batches, 1 / (4 * TOKENS))
        found.append(sums["loss"].item())
        set_learning_rate(optimizer, 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    return found


def cases(rank: int, world_size: int) -> dict[str, Any]:
    return {
        name: [losses(rank, world_size, name, compiled) for compiled in (False, True)]
        for name in CASES
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(cases, 2)


@pytest.mark.parametrize("name", CASES)
def test_compiled_blocks_train_alike(name: str, ranks: list[dict[str, Any]]) -> None:
    # bfloat16 rounds elsewhere when operations are fused.
    tolerance = 1e-3 if "precision" in CASES[name] else 1e-5
    for rank in ranks:
        expected, found = rank[name]
        assert found == pytest.approx(expected, rel=tolerance)
    assert sum(rank[name][1][0] for rank in ranks) > 0
