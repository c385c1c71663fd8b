"""Compiled blocks: the same losses as without, and how often torch compiles anew.

By aot_eager: it traces both passes as inductor does, but makes no code, which takes minutes.
"""

from typing import Any

import pytest
import torch
from looped_models import POISSON, looped_tree
from small import layers_tree, run_config
from torch._dynamo.utils import counters

from megarec.config.schema import Config, ParallelConfig
from megarec.errors import UserError
from megarec.models import build_model
from megarec.models.context import Context, Draw
from megarec.optim.build import build_optimizer, set_learning_rate
from megarec.parallel.apply import recompute
from megarec.parallel.compile import check_compile, compile_blocks
from megarec.parallel.plan import plan

ROWS, TOKENS, STEPS = 2, 8, 5
MLSTM = {"type": "mlstm", "num_heads": 2, "igate_bias_init": -6.0, "chunk_size": 4}
MAMBA = {"type": "mamba2", "num_heads": 2, "head_dim": 8, "state_dim": 8, "chunk_size": 4}
LOOP = {"depth": POISSON, "backprop": 2, "update": {"type": "gated"}}
MODELS: dict[str, dict[str, Any]] = {
    "linear": layers_tree(MLSTM, MAMBA, MLSTM),
    "para_gru": layers_tree({"type": "para_gru", "num_heads": 2}),
    "looped": looped_tree(**LOOP),
}


def recipe(name: str) -> Config:
    how = "recurrence" if name == "looped" else "none"
    return run_config(model=MODELS[name], parallel={"activation_checkpointing": how})


def losses(config: Config, compiled: bool) -> list[float]:
    model = build_model(config.model, seed=config.seed).train()
    recompute(model, config.parallel)
    if compiled:
        compile_blocks(model, "aot_eager")
    optimizer, found = build_optimizer(model, config.optimizer), []
    for step in range(STEPS):
        ids = torch.randint(61, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step))
        resets = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
        resets[:, step] = True
        draw = Draw(config.seed, step, step, torch.arange(ROWS))
        loss, _ = model(ids, ids, ctx=Context(resets=resets, draw=draw))
        (loss / ids.numel()).backward()
        set_learning_rate(optimizer, 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_compiled_blocks_train_alike(name: str) -> None:
    config = recipe(name)
    expected = losses(config, compiled=False)
    torch._dynamo.reset()
    counters.clear()
    assert losses(config, compiled=True) == pytest.approx(expected, rel=1e-5)
    graphs = counters["stats"]["unique_graphs"]
    if name == "para_gru":
        # The solver is not compiled, and stands between graphs.
        assert counters["graph_break"] and graphs > 1
    else:
        # One a kind of block, however many layers and recurrences there are; in a loop another for
        # recurrences that are not differentiated.
        assert not counters["graph_break"] and graphs == 2


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"activation_checkpointing": "selective"}, "compile: not with .*=selective: torch 2"),
        ({"tp": 2}, "compile: not with tp=2: torch 2"),
    ],
)
def test_what_torch_cannot_compile_is_refused(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_compile(ParallelConfig.model_construct(compile=True, **parallel))
    assert len(error.value.lines) == 1 and "\n" not in error.value.lines[0]


def test_the_plan_refuses_it_too() -> None:
    with pytest.raises(UserError, match="compile: not with"):
        plan(run_config(parallel={"compile": True, "activation_checkpointing": "selective"}), 1)
