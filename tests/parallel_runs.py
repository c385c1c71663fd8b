"""A few optimizer steps of tiny models on any mesh, to be compared with one process."""

from typing import Any

import pytest
import torch
from looped_models import POISSON, looped_tree
from small import layers_tree, model_tree, run_config

from megarec.config.schema import Config
from megarec.models.context import Context, Draw
from megarec.optim.build import build_optimizer, set_learning_rate
from megarec.optim.clip import gradient_norm
from megarec.parallel.apply import Sharded, build_sharded_model
from megarec.parallel.mesh import build_mesh, place
from megarec.train.executor import Direct, Executor, MicroBatch, Pipelined
from megarec.train.objective import next_token

ROWS, TOKENS, STEPS = 8, 16, 5
CPU = torch.device("cpu")
ATTENTION = {"type": "attention", "num_heads": 4, "num_kv_heads": 2, "qk_norm": True}
MAMBA = {"type": "mamba2", "num_heads": 4, "head_dim": 16, "state_dim": 8, "num_groups": 2}
# With gates as open as in "mlstm" the normaliser's kinks amplify rounding: sharding alone, which
# adds gradients in another order, moves the gradient norm by 1e-5 to 3e-3 within five steps.
CALM = {"type": "mlstm", "num_heads": 2, "igate_bias_init": -6.0, "chunk_size": 8}
EVEN: dict[str, Any] = {"vocab_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    "mlstm": model_tree(num_layers=5, **EVEN),
    "calm mlstm": model_tree(
        num_layers=5, blocks={"mlstm": {"mixer": CALM, "ffn": {"d_ff": 48}}}, **EVEN
    ),
    "tied": model_tree(num_layers=3, head={"tie_embeddings": True}, **EVEN),
    "looped": looped_tree(depth=POISSON, backprop=2, norm_core_output=True) | EVEN,
    "hybrid": layers_tree(MAMBA, ATTENTION, MAMBA, MAMBA, MAMBA, **EVEN),
    "para_gru": layers_tree(*[{"type": "para_gru"}] * 3, **EVEN),
}
Cases = dict[str, tuple[str, dict[str, Any]]]
"""Name -> name of a model, and the section `parallel`; without `dp_shard` that takes the rest."""


def recipe(model: str, parallel: dict[str, Any]) -> Config:
    train = {"steps": 12, "seq_len": TOKENS, "global_batch_size": ROWS, "micro_batch_size": 2}
    return run_config(model=MODELS[model], parallel=parallel, train=train)


def build(config: Config, world_size: int) -> tuple[Sharded, Executor, torch.optim.Optimizer]:
    sharded = build_sharded_model(config, build_mesh(config.parallel, world_size, "cpu"), CPU)
    executor: Executor = (
        Pipelined(sharded, config, CPU) if sharded.stages else Direct(sharded, config, next_token)
    )
    return sharded, executor, build_optimizer(sharded.model, config.optimizer)


def rows(step: int, samples: list[int]) -> MicroBatch:
    """The rows of a step by their numbers, of documents that end somewhere."""
    ids = torch.stack(
        [
            torch.randint(61, (TOKENS,), generator=torch.Generator().manual_seed(100 * step + i))
            for i in samples
        ]
    )
    doc_ids = torch.stack([(torch.arange(TOKENS) > i).int() for i in samples])
    draw = Draw(0, step, step, torch.tensor(samples))
    ctx = Context(resets=Context.from_doc_ids(doc_ids).resets, draw=draw)
    return MicroBatch(ids, ids.roll(-1, 1), ctx)


def train(rank: int, world_size: int, cases: Cases) -> dict[str, Any]:
    """Loss and gradient norm of each step, and a held-out loss: this rank's part of them."""
    results: dict[str, Any] = {}
    for name, (model, parallel) in cases.items():
        config = recipe(model, parallel)
        sharded, executor, optimizer = build(config, world_size)
        at = place(config.parallel, rank, world_size)
        size, share = config.train.micro_batch_size, ROWS // at.data_ranks
        first, found = share * at.data_rank, []
        sharded.model.train()
        for step in range(STEPS):
            batches = [
                rows(step, list(range(i, i + size))) for i in range(first, first + share, size)
            ]
            sums = executor.forward_backward(batches, at.data_ranks / (ROWS * TOKENS))
            norm = gradient_norm(sharded.model, sharded.twins).item()
            found.append((sums["loss"].item() * at.counts_loss, norm))
            set_learning_rate(optimizer, 1e-3)
            optimizer.step()
            optimizer.zero_grad()
        sharded.model.eval()
        held_out = rows(STEPS, list(range(first, first + 2)))
        loss = executor.loss_sum(held_out.input_ids, held_out.labels, held_out.ctx)
        results[name] = {"steps": found, "valid": loss.item() * at.counts_loss}
    return results


def assert_equal(ranks: list[dict[str, Any]], expected: dict[str, Any], name: str) -> None:
    for step, (loss, norm) in enumerate(expected[name]["steps"]):
        tolerance = 1e-6 if step == 0 else 1e-5
        ours = [rank[name]["steps"][step] for rank in ranks]
        assert sum(part for part, _ in ours) == pytest.approx(loss, rel=tolerance)
        assert [norm for _, norm in ours] == pytest.approx([norm] * len(ours), rel=tolerance)


def errors(ranks: list[dict[str, Any]], expected: dict[str, Any], name: str) -> list[float]:
    """The largest relative errors: loss and norm of the first step, and of all."""
    found = []
    for step, (loss, norm) in enumerate(expected[name]["steps"]):
        ours = [rank[name]["steps"][step] for rank in ranks]
        found.append(
            (
                abs(sum(part for part, _ in ours) / loss - 1),
                max(abs(n / norm - 1) for _, n in ours),
            )
        )
    return [*found[0], max(a for a, _ in found), max(b for _, b in found)]
