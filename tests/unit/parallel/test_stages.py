"""Which layers each stage of a pipeline has, and what a mesh or a schedule refuses."""

from typing import Any

import pytest
from looped_models import POISSON, looped_tree
from small import model_tree, run_config

from megarec.config.schema import Config
from megarec.errors import UserError
from megarec.parallel.mesh import place, resolve_axes
from megarec.parallel.plan import plan
from megarec.parallel.stages import balanced, parts, rank_of


def recipe(model: dict[str, Any], **parallel: Any) -> Config:
    return run_config(model=model, parallel={"pp": 2} | parallel)


def test_the_largest_stage_is_as_small_as_can_be() -> None:
    assert balanced([1, 1, 1, 1], 2) == [2, 4]
    assert balanced([1, 1, 1, 3], 2) == [3, 4]
    assert balanced([9, 1, 1, 1], 3) == [1, 2, 4]


def test_stages_cover_all_layers_once_and_the_head_weighs() -> None:
    every = parts(recipe(model_tree(num_layers=7), pp_schedule="interleaved_1f1b"))
    assert [i for part in every for i in part.layers] == list(range(7))
    assert [part.first for part in every] == [True, False, False, False]
    assert [part.last for part in every] == [False, False, False, True]
    heavy = model_tree(num_layers=6, vocab_size=4096)
    assert [len(part.layers) for part in parts(recipe(heavy))] == [5, 1]


def test_a_looped_core_is_one_piece() -> None:
    config = recipe(looped_tree(depth=POISSON))
    core = set(config.model.stack.core_blocks)
    holders = [part for part in parts(config) if core & set(part.layers)]
    assert len(holders) == 1 and core <= set(holders[0].layers)


def test_stages_are_dealt_in_turn_or_there_and_back() -> None:
    schedules = ("interleaved_1f1b", "zbv")
    configs = [recipe(model_tree(num_layers=4), pp_schedule=name) for name in schedules]
    dealt = [[rank_of(stage, config.parallel) for stage in range(4)] for config in configs]
    assert dealt == [[0, 1, 0, 1], [0, 1, 1, 0]]


def test_places_follow_the_axes_from_the_outermost() -> None:
    config = run_config(parallel={"pp": 2, "dp_replicate": 2}).parallel
    assert resolve_axes(config, 8)["dp_shard"] == 2
    places = [place(config, rank, 8) for rank in range(8)]
    assert [p.data_rank for p in places] == [0, 1, 2, 3] * 2
    assert [p.pp_rank for p in places] == [0] * 4 + [1] * 4
    assert [p.counts_data for p in places] == [True] * 4 + [False] * 4
    with pytest.raises(UserError, match="pp=2 x dp_replicate=2 x dp_shard=1 = 4 processes, but 3"):
        resolve_axes(config, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pp": 4}, "= 4 stages, but the 2 layers divide into 2"),
        ({"pp_schedule": "zbv"}, "= 4 stages, but the 2 layers"),
        ({"activation_checkpointing": "selective", "saved_ops": ["matmull"]}, "matmull: torch"),
        ({"pp": 2, "dp_shard": 4}, "as many micro-batches a step as stages, got 1 for pp=2"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_plan(changes: dict[str, Any], message: str) -> None:
    config = recipe(model_tree(), **changes)
    sizes = config.parallel
    with pytest.raises(UserError, match=message):
        plan(config, sizes.pp * max(sizes.dp_shard, 1))


def test_a_rank_cannot_shard_a_module_for_two_stages() -> None:
    tied = model_tree(num_layers=4, head={"tie_embeddings": True})
    plan(recipe(tied, pp_schedule="interleaved_1f1b"), 2)
    with pytest.raises(UserError, match=r"zbv: stages \[0, 3\] both need model.embedding"):
        plan(recipe(tied, pp_schedule="zbv"), 2)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"cp": 2}, "sequence parallelism is not built yet"),
        ({"pp_schedule": "1f1b", "pp_stages_per_rank": 2}, "1f1b runs one stage a rank"),
        ({"pp_schedule": "zbv", "pp_stages_per_rank": 3}, "zbv runs 2 stages a rank"),
        ({"pp_schedule": "interleaved_1f1b", "pp_stages_per_rank": 1}, "runs 2 or more stages"),
    ],
)
def test_what_cannot_be_is_refused_by_the_config(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_config(parallel=parallel)


def test_a_pipeline_divides_the_states() -> None:
    whole = plan(run_config(model=model_tree(num_layers=4)), 1)
    halves = plan(recipe(model_tree(num_layers=4)), 2)
    assert halves.micro_batches == whole.micro_batches == 4
    for kind in ("parameters", "gradients", "optimizer"):
        assert halves.memory_bytes[kind] == whole.memory_bytes[kind] / 2
