"""A head whose vocabulary is divided over ranks equals the whole, and megatron-core's layers."""

from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megarec_kernels.dispatch import triton_problem
from megarec_kernels.linear_cross_entropy import VocabularyPart, linear_cross_entropy
from parallel_runs import CPU, rows
from small import model_tree, run_config
from torch import Tensor

from megarec.parallel.apply import build_sharded_model
from megarec.parallel.mesh import build_mesh
from megarec.testing.distributed import run_ranks

VOCAB, D_MODEL, D_FF = 64, 32, 48

LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft cap, z-loss": {"soft_cap": 5.0, "z_loss": 1e-3},
    "weighted, z-loss": {"weighted": True, "z_loss": 1e-3},
    "reference": {"backend": "reference", "soft_cap": 5.0, "z_loss": 1e-3},
    "reference, weighted": {"backend": "reference", "weighted": True},
}
if triton_problem(torch.empty(0)) is None:  # it runs in Triton's interpreter
    LOSSES["gpu"] = {"backend": "gpu", "soft_cap": 5.0, "z_loss": 1e-3}
    LOSSES["gpu, weighted"] = {"backend": "gpu", "weighted": True}


def loss_and_gradients(
    x_ND: Tensor, weight_VD: Tensor, labels: Tensor, weights: Tensor, weighted: bool, **options: Any
) -> dict[str, Tensor]:
    inputs = {"x": x_ND, "weight": weight_VD} | ({"token_weights": weights} if weighted else {})
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    loss = linear_cross_entropy(labels=labels, chunk_size=7, **inputs, **options)
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return {"loss": loss.detach(), **dict(zip(inputs, gradients, strict=True))}


def losses(rank: int) -> dict[str, dict[str, float]]:
    """Relative errors of each of LOSSES against the whole vocabulary's."""

    def reduce(x: Tensor, op: Any) -> Tensor:
        dist.all_reduce(x, op)
        return x

    add, largest = (partial(reduce, op=op) for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX))
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    x_ND, weight_VD, token_weights = draw(23, 8), draw(20, 8), draw(23).abs()
    labels = torch.randint(20, (23,), generator=generator)
    labels[::5] = -100
    found = {}
    for name, case in LOSSES.items():
        options = {"weighted": False} | case
        inputs = x_ND, weight_VD, labels, token_weights
        expected = loss_and_gradients(*inputs, **options | {"backend": "reference"})
        part = VocabularyPart(10 * rank, add, largest)
        inputs = x_ND, weight_VD.chunk(2)[rank], labels, token_weights
        ours = loss_and_gradients(*inputs, **options, vocabulary=part)
        add(ours["x"])
        expected["weight"] = expected["weight"].chunk(2)[rank]
        found[name] = {
            key: float((ours[key] - value).norm() / value.norm()) for key, value in expected.items()
        }
    return found


def oracle() -> dict[str, float]:
    """Relative errors of loss and gradients against megatron-core's layers with our weights."""
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        vocab_parallel_cross_entropy,
    )

    blocks = {"b": {"ffn": {"type": "gelu", "d_ff": D_FF}}}
    tree = model_tree(vocab_size=VOCAB, num_layers=1, blocks=blocks, pattern=["b"], head={})
    config = run_config(model=tree, parallel={"tp": 2})
    model = build_sharded_model(config, build_mesh(config.parallel, 2, "cpu"), CPU).model
    # FSDP gathers what the model as a whole needs; its axes are of one rank here.
    model.unshard()
    ffn = model.block(0).ffn
    ours = {"embedding": model.embedding, "up": ffn.up, "down": ffn.down, "head": model.head}

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    common = {
        "config": ModelParallelConfig(tensor_model_parallel_size=2, use_cpu_initialization=True),
        "init_method": torch.nn.init.zeros_,
    }
    linear = common | {"bias": False, "skip_bias_add": True}
    theirs = {
        "embedding": VocabParallelEmbedding(VOCAB, D_MODEL, **common),
        "up": ColumnParallelLinear(D_MODEL, D_FF, gather_output=False, **linear),
        "down": RowParallelLinear(D_FF, D_MODEL, input_is_parallel=True, **linear),
        "head": ColumnParallelLinear(D_MODEL, VOCAB, gather_output=False, **linear),
    }
    model.block(0).unshard()
    with torch.no_grad():
        for name, module in ours.items():
            theirs[name].weight.copy_(module.weight.to_local())

    batch = rows(0, [0, 1])
    loss = model.head(ffn(model.embedding(batch.input_ids)), None, batch.labels)
    loss.backward()
    hidden, _ = theirs["up"](theirs["embedding"](batch.input_ids))
    y, _ = theirs["down"](torch.nn.functional.gelu(hidden))
    logits, _ = theirs["head"](y)
    # megatron-core has time first.
    logits, labels = logits.transpose(0, 1).contiguous(), batch.labels.T.contiguous()
    expected = vocab_parallel_cross_entropy(logits, labels).sum()
    expected.backward()
    parallel_state.destroy_model_parallel()
    found = {"loss": abs(float(loss - expected)) / float(expected)}
    for name, module in ours.items():
        gradient = theirs[name].weight.grad
        found[name] = float((module.weight.grad.to_local() - gradient).norm() / gradient.norm())
    return found


def everything(rank: int, world_size: int) -> dict[str, Any]:
    return {"losses": losses(rank), "oracle": oracle()}


@cache
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything, 2)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_and_its_gradients_are_those_of_the_whole_vocabulary(name: str) -> None:
    for rank in ranks():
        assert max(rank["losses"][name].values()) < 1e-12


def test_embedding_ffn_and_head_equal_megatron_core() -> None:
    for rank in ranks():
        assert max(rank["oracle"].values()) < 1e-6
