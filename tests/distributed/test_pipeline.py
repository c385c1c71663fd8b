"""Pipeline parallelism: every schedule equals one process, in training and evaluation."""

from typing import Any

import pytest
from parallel_runs import MODELS, Cases, errors, train, train_alone

from megarec.testing.distributed import run_ranks

OTHERS = [name for name in MODELS if "mlstm" not in name]
SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv")
CASES: Cases = {
    **{f"mlstm, {schedule}": ("mlstm", {"pp_schedule": schedule}) for schedule in SCHEDULES},
    **{
        f"calm mlstm, {schedule}": ("calm mlstm", {"pp_schedule": schedule})
        for schedule in SCHEDULES
    },
    **{name: (name, {}) for name in OTHERS},
    **{f"{name}, zero_bubble": (name, {"pp_schedule": "zero_bubble"}) for name in OTHERS},
    "looped, recomputed": ("looped", {"activation_checkpointing": "recurrence"}),
    "recomputed, zero_bubble": (
        "mlstm",
        {"pp_schedule": "zero_bubble", "activation_checkpointing": "full"},
    ),
}
# Open gates are harder; where sharding adds gradients in another order they must be calm.
TWO = [name for name in CASES if not name.startswith("calm")]
FOUR = [name for name in CASES if name.startswith("calm")] + OTHERS


def pipelines(names: list[str]) -> Cases:
    return {name: (CASES[name][0], {"pp": 2} | CASES[name][1]) for name in names}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return train_alone({model for model, _ in CASES.values()})


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(train, 2, pipelines(TWO))


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    return run_ranks(train, 4, pipelines(FOUR))


@pytest.mark.parametrize("name", TWO)
def test_two_stages_or_more_equal_one_process(name: str, two: Any, alone: Any) -> None:
    ours, expected = [rank[name] for rank in two], alone[CASES[name][0]]
    first, *later = errors(ours, expected)
    assert first < 1e-6
    assert max(later) < 1e-5
    assert sum(rank["valid"] for rank in ours) == pytest.approx(expected["valid"], rel=1e-5)


@pytest.mark.parametrize("name", FOUR)
def test_sharded_stages_equal_one_process(name: str, four: Any, alone: Any) -> None:
    first, *later = errors([rank[name] for rank in four], alone[CASES[name][0]])
    assert first < 1e-6
    assert max(later) < 1e-5
