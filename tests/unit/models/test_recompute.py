"""Activation checkpointing of a block: the same gradients, less memory, and what runs twice."""

from typing import Any

import pytest
import torch
from small import model_tree, run_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megarec.config.model import ModelConfig
from megarec.config.schema import SAVED_OPS
from megarec.errors import UserError
from megarec.models.block import Block
from megarec.models.context import Context
from megarec.models.recompute import find_ops
from megarec.testing import case
from megarec.testing.memory import Memory, measure

MIXERS: dict[str, dict[str, Any]] = {
    "mlstm": {"num_heads": 2, "igate_bias_init": -1.0, "chunk_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_dim": 16, "chunk_size": 8},
    "attention": {"num_heads": 2},
    "para_gru": {"num_heads": 2},
}
HOW = ("none", "selective", "full")


class Matmuls(TorchDispatchMode):
    """Counts the matmuls of linear layers."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def block_of(family: str, how: str) -> Block:
    mixer = {"type": family, **MIXERS[family]}
    blocks = {"block": {"mixer": mixer, "ffn": {"d_ff": 48}}}
    tree = model_tree(num_layers=1, blocks=blocks, pattern=["block"])
    block = case.random_model(ModelConfig.model_validate(tree), 0).block(0)
    block.recompute = how != "none"
    block.saved_ops = find_ops(SAVED_OPS) if how == "selective" else frozenset()
    return block


def run(block: Block) -> tuple[Memory, list[Tensor]]:
    x_BTD = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    resets = torch.zeros(2, 32, dtype=torch.bool)
    resets[1, 11] = True
    memory = measure(block, lambda: block(x_BTD, Context(resets=resets))[0].square().sum())
    leaves = [x_BTD, *block.parameters()]
    return memory, [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("family", MIXERS)
def test_same_gradients_and_less_memory(family: str) -> None:
    found = {how: run(block_of(family, how)) for how in HOW}
    expected = found["none"][1]
    assert len(expected) == 1 + len(list(block_of(family, "none").parameters()))
    for how in HOW:
        assert all(map(torch.equal, found[how][1], expected))
    kept = [found[how][0].activations for how in HOW]
    assert kept[0] > kept[1] > kept[2] > 0


@pytest.mark.parametrize("family", MIXERS)
def test_saved_matmuls_run_once(family: str) -> None:
    counts = {}
    for how in HOW:
        with Matmuls() as matmuls:
            run(block_of(family, how))
        counts[how] = matmuls.count
    assert counts["none"] == counts["selective"] < counts["full"]


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(UserError, match=r"saved_ops: matmull: .* has no such op") as error:
        find_ops(["mm", "matmull"])
    assert "\n" not in str(error.value)


def test_saved_ops_belong_to_selective() -> None:
    with pytest.raises(ValueError, match="saved_ops: activation_checkpointing=full keeps none"):
        run_config(parallel={"activation_checkpointing": "full", "saved_ops": ["mm"]})
    run_config(parallel={"activation_checkpointing": "selective", "saved_ops": ["mm"]})
