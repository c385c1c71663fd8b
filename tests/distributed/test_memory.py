"""The memory that a plan promises is what two ranks of FSDP2 hold."""

from typing import Any

import pytest
import torch
from looped_models import ATTENTION, looped_tree
from small import layers_tree, run_config

from megarec.config.schema import Config
from megarec.models.context import Context
from megarec.optim.build import build_optimizer, set_learning_rate
from megarec.parallel.apply import build_sharded_model, release_core
from megarec.parallel.mesh import build_mesh
from megarec.parallel.plan import memory_per_rank
from megarec.testing.distributed import run_ranks
from megarec.testing.memory import measure

ROWS, TOKENS = 4, 64
MLSTM = {"type": "mlstm", "num_heads": 2, "chunk_size": 16}
MAMBA = {"type": "mamba2", "num_heads": 4, "head_dim": 16, "state_dim": 16, "num_groups": 2}
MODELS = {
    "hybrid": layers_tree(MAMBA, ATTENTION, MLSTM, MAMBA, ATTENTION, MLSTM),
    "looped": looped_tree(update={"type": "gated"}),
}
# A model, how activations are kept, the compute dtype, and how many ranks divide tensors.
CASES: list[tuple[str, str, str, int]] = [
    ("hybrid", "none", "float32", 1),
    ("hybrid", "selective", "float32", 1),
    ("hybrid", "full", "float32", 1),
    ("looped", "none", "float32", 1),
    ("looped", "recurrence", "float32", 1),
    ("hybrid", "none", "bfloat16", 1),
    ("hybrid", "full", "bfloat16", 1),
    ("hybrid", "none", "float32", 2),
    ("hybrid", "selective", "float32", 2),
    ("hybrid", "full", "float32", 2),
    ("hybrid", "none", "bfloat16", 2),
]


def recipe(model: str, how: str, compute: str, tp: int) -> Config:
    # What two ranks hold is a half where every parameter has an even number of rows.
    tree = MODELS[model] | {"vocab_size": 64, "head": {"chunk_size": 64}}
    return run_config(
        model=tree,
        parallel={"activation_checkpointing": how, "tp": tp},
        precision={"compute": compute},
        train={"seq_len": TOKENS, "global_batch_size": 2 * ROWS, "micro_batch_size": ROWS},
    )


def cases(rank: int, world_size: int) -> list[dict[str, float]]:
    ids = torch.randint(64, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    resets = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    resets[:, TOKENS // 3] = True
    found = []
    for case in CASES:
        config = recipe(*case)
        mesh = build_mesh(config.parallel, world_size, "cpu")
        model = build_sharded_model(config, mesh, torch.device("cpu")).model.train()
        optimizer = build_optimizer(model, config.optimizer)
        set_learning_rate(optimizer, 1e-3)

        def forward(model: Any = model) -> torch.Tensor:
            return model(ids, ids, ctx=Context(resets=resets))[0]

        def release(model: Any = model, config: Config = config) -> None:
            release_core(model, config)

        found.append(vars(measure(model, forward, optimizer, release)))
    return found


@pytest.fixture(scope="module")
def ranks() -> list[list[dict[str, float]]]:
    return run_ranks(cases, 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rank_holds_what_the_plan_says(case: tuple[str, str, str, int], ranks: Any) -> None:
    config = recipe(*case)
    promised = memory_per_rank(config, 2 // config.parallel.tp)
    for rank in ranks:
        held = rank[CASES.index(case)]
        for kind in ("parameters", "gradients", "optimizer"):
            assert held[kind] == promised[kind]
        # FSDP holds the gradients that it has reduced, too.
        gathered = promised["gathered"] + promised["gradients"]
        assert held["gathered"] == pytest.approx(gathered, rel=0.25)
        assert held["peak"] == pytest.approx(promised["activations"] + promised["head"], rel=0.25)
