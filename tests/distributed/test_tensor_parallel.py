"""Tensor parallelism: what moves, and what each rank holds."""

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from parallel_runs import CPU, MODELS, Run, rows, train_alone
from small import model_tree, run_config
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megarec.models.backbone import Backbone, build_model
from megarec.parallel.apply import build_sharded_model
from megarec.parallel.mesh import build_mesh
from megarec.testing.distributed import run_ranks

VOCAB, D_MODEL, D_FF = 64, 32, 48


def tree(**model: Any) -> dict[str, Any]:
    """The model section of attention and GELU, what megatron-core has too."""
    mixer = {"type": "attention", "num_heads": 2}
    blocks = {"b": {"mixer": mixer, "ffn": {"type": "gelu", "d_ff": D_FF}}}
    return model_tree(vocab_size=VOCAB, blocks=blocks, pattern=["b"]) | model


def build(checkpointing: str = "none", **model: Any) -> Backbone:
    """It, divided over two ranks."""
    parallel = {"tp": 2, "activation_checkpointing": checkpointing}
    config = run_config(model=tree(**model), parallel=parallel)
    return build_sharded_model(config, build_mesh(config.parallel, 2, "cpu"), CPU).model


class Collectives(TorchDispatchMode):
    """Counts collectives by name; FSDP has none here, its axes being of one rank."""

    names = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "allreduce_")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts.update(name for name in self.names if name == func._opname)
        return func(*args, **kwargs or {})


def count(model: Backbone) -> tuple[dict[str, int], dict[str, int]]:
    """The collectives of a forward and of a backward pass."""
    batch = rows(0, [0, 1])
    with Collectives() as forward:
        loss, _ = model(batch.input_ids, batch.labels, ctx=batch.ctx)
    with Collectives() as backward:
        loss.backward()
    return dict(forward.counts), dict(backward.counts)


def counts() -> dict[str, Any]:
    models = {
        "one block": build(num_layers=1),
        "three blocks": build(num_layers=3),
        "full": build("full", num_layers=1),
        "selective": build("selective", num_layers=1),
    }
    return {name: count(model) for name, model in models.items()}


def placements(rank: int) -> dict[str, str]:
    """How parameters lie on `tp`, and where their gradients do not lie alike."""
    found: dict[str, str] = {}
    for name in MODELS:
        run = Run(rank, 2, name, {"tp": 2})
        run.gradients(0)
        for parameter_name, parameter in run.sharded.model.named_parameters():
            key = f"{name}: {parameter_name}"
            if not isinstance(parameter, DTensor):
                found[key] = "not a DTensor"
                continue
            found[key] = str(parameter.placements[-1])
            if parameter.grad is None or parameter.grad.placements != parameter.placements:
                found[key] += ", but not its gradient"
    return found


def logits() -> dict[str, Tensor]:
    ids, model = rows(0, [0, 1]).input_ids, build()
    return {"found": model(ids), "expected": build_model(model.config, seed=1234)(ids)}


def bfloat16(rank: int) -> dict[str, float]:
    run = Run(rank, 2, "hybrid", {"tp": 2}, "bfloat16")
    loss = run.gradients(0)
    dtypes = {str(p.grad.dtype) for p in run.sharded.model.parameters() if p.grad is not None}
    return {"loss": loss, "wide": float(dtypes == {"torch.float32"})}


def recomputed(rank: int) -> dict[str, list[tuple[float, float]]]:
    """Loss and gradient norm of modules in two precisions, whatever is kept of the forward."""
    return {
        f"{model}, {mesh}": [
            Run(rank, 2, model, mesh | {"activation_checkpointing": how}, "bfloat16").step(0)
            for how in ("none", "selective", "full")
        ]
        for model in ("hybrid", "looped mlstm")
        for mesh in ({"tp": 2}, {"dp_shard": 2})
    }


def everything(rank: int, world_size: int) -> dict[str, Any]:
    return {
        "counts": counts(),
        "placements": placements(rank),
        "logits": logits(),
        "bfloat16": bfloat16(rank),
        "recomputed": recomputed(rank),
    }


@cache
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything, 2)


# A block: before and after the mixer, and the FFN. The embedding scatters, the head gathers. Two
# chunks of tokens meet twice each. Backward it is the other way round, and each norm's gradient is
# added up. Recomputation moves all anew, but for the last scatter and what `selective` keeps.
GATHERED, SCATTERED = "all_gather_into_tensor", "reduce_scatter_tensor"
COUNTS = {
    "one block": (3, 3, {GATHERED: 3, SCATTERED: 3, "all_reduce": 3}),
    "three blocks": (7, 7, {GATHERED: 7, SCATTERED: 7, "all_reduce": 7}),
    "full": (3, 3, {GATHERED: 5, SCATTERED: 4, "all_reduce": 3}),
    "selective": (3, 3, {GATHERED: 3, SCATTERED: 3, "all_reduce": 3}),
}


@pytest.mark.parametrize("name", COUNTS)
def test_collectives_of_a_pass(name: str) -> None:
    gathered, scattered, backward = COUNTS[name]
    forward = {GATHERED: gathered, SCATTERED: scattered, "allreduce_": 4}
    for rank in ranks():
        assert rank["counts"][name] == (forward, backward)


def test_every_parameter_is_divided_or_whole_as_planned_and_so_is_its_gradient() -> None:
    column, row, whole = "S(0)", "S(1)", "R"
    expected = {
        "mlstm: embedding.weight": column,
        "mlstm: blocks.0.mixer_norm.weight": whole,
        "mlstm: blocks.0.mixer.gates.igate.bias": column,
        "mlstm: blocks.0.mixer.out_proj.weight": row,
        "mlstm: blocks.0.ffn.up.weight": column,
        "mlstm: blocks.0.ffn.down.weight": row,
        "mlstm: norm.weight": whole,
        "mlstm: head.weight": column,
        "para_gru: blocks.0.mixer.recurrence.bias": row,
        "hybrid: blocks.1.mixer.q_norm.weight": whole,
        "hybrid: blocks.0.mixer.dynamics.A_log": column,
        "looped: stack.adapter.weight": whole,
    }
    for rank in ranks():
        found = rank["placements"]
        assert set(found.values()) == {column, row, whole}
        assert {name: found[name] for name in expected} == expected


def test_logits_are_whole_on_every_rank() -> None:
    for rank in ranks():
        torch.testing.assert_close(rank["logits"]["found"], rank["logits"]["expected"])


def test_bfloat16_keeps_gradients_in_float32() -> None:
    ((loss, _), *_) = train_alone(["hybrid"])["hybrid"]["steps"]
    assert sum(rank["bfloat16"]["loss"] for rank in ranks()) == pytest.approx(loss, rel=1e-2)
    assert all(rank["bfloat16"]["wide"] for rank in ranks())


def test_recomputation_changes_no_bit_where_fsdp_gathers_inside_of_a_block() -> None:
    for rank in ranks():
        for name, (kept, *again) in rank["recomputed"].items():
            assert again == [kept, kept], name
