"""ELLISAdam on sharded parameters: what one process computes, in one reduction a group."""

from collections.abc import Callable
from typing import Any

import torch
from small import run_config
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from megarec.config.schema import Config
from megarec.models import build_model
from megarec.optim.build import build_optimizer, set_learning_rate
from megarec.parallel.apply import build_sharded_model
from megarec.parallel.mesh import build_mesh
from megarec.testing.distributed import run_ranks

MESHES = {"sharded": {"dp_shard": 2}, "replicated": {"dp_replicate": 2, "dp_shard": 1}}
OPTIMIZER = {"type": "ellis_adam", "lr": 1e-2, "weight_decay": 1e-2, "decay_embeddings": True}
STEPS = 4


def config_of(parallel: dict[str, int]) -> Config:
    # 61 tokens and one head: shards of unequal size, and some that are empty.
    mixer = {"type": "mlstm", "num_heads": 1}
    model = {"blocks": {"mlstm": {"mixer": mixer, "ffn": {"d_ff": 48}}}}
    return run_config(optimizer=OPTIMIZER, parallel=parallel, model=model)


def train(
    model: nn.Module, config: Config, distribute: Callable[[Tensor, Tensor], Tensor]
) -> list[int]:
    """Make updates with random gradients, one of them a spike; returns reductions per update."""
    optimizer = build_optimizer(model, config.optimizer)
    counts = []
    for step in range(STEPS):
        set_learning_rate(optimizer, config.optimizer.lr * (step + 1) / STEPS)
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            # Growing towards the last rows: no shard has the mean of the whole.
            gradient *= torch.linspace(0.1, 2, len(gradient)).view(-1, *[1] * (gradient.ndim - 1))
            parameter.grad = distribute(gradient * 5 ** (step == 2), parameter)
        with CommDebugMode() as communication:
            optimizer.step()
        counts.append(communication.get_total_counts())
    return counts


def cases(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, parallel in MESHES.items():
        config = config_of(parallel)
        mesh = build_mesh(config.parallel, world_size, "cpu")
        model = build_sharded_model(config, mesh, torch.device("cpu")).model

        def shard(gradient: Tensor, like: Tensor) -> Tensor:
            assert isinstance(like, DTensor)
            return distribute_tensor(gradient, like.device_mesh, like.placements)

        counts = train(model, config, shard)
        weights = {k: p.full_tensor().detach() for k, p in model.named_parameters()}
        results[name] = {"counts": counts, "weights": weights}
    return results


def test_ellis_adam() -> None:
    config = config_of({})
    whole = build_model(config.model, seed=config.seed)
    train(whole, config, lambda gradient, like: gradient)
    num_groups = len(build_optimizer(whole, config.optimizer).param_groups)
    for result in run_ranks(cases, 2):
        for mesh in MESHES:
            for name, parameter in whole.named_parameters():
                difference = result[mesh]["weights"][name] - parameter.detach()
                assert difference.abs().max() <= 1e-6, name
        assert result["sharded"]["counts"] == [num_groups] * STEPS
        assert result["replicated"]["counts"] == [0] * STEPS
