"""Any mesh equals one process: data, tensor and pipeline parallelism, alone and together.

In float64, where nothing but rounding of 1e-16 may differ, and in float32, as it is used.
"""

from functools import cache
from typing import Any

import pytest
from parallel_runs import Cases, Parallel, errors, train, train_alone

from megarec.testing.distributed import run_ranks

TP: Parallel = {"tp": 2}
MESHES: dict[int, dict[str, tuple[Parallel, tuple[str, ...]]]] = {
    2: {
        "tp": (TP, ("mlstm", "looped", "hybrid", "para_gru")),
        "tp, full": (TP | {"activation_checkpointing": "full"}, ("mlstm",)),
        "tp, selective": (TP | {"activation_checkpointing": "selective"}, ("hybrid",)),
        "tp, recurrence": (TP | {"activation_checkpointing": "recurrence"}, ("looped",)),
    },
    4: {
        "hsdp": ({"dp_replicate": 2}, ("looped",)),
        "tp 4": ({"tp": 4}, ("para_gru",)),
        "fsdp x tp": (TP, ("tied", "looped", "hybrid", "para_gru")),
        "replicated x tp": (TP | {"dp_replicate": 2}, ("mlstm",)),
        "pp x tp": (TP | {"pp": 2}, ("tied", "looped", "hybrid", "para_gru")),
        "pp x tp, zero-bubble": (TP | {"pp": 2, "pp_schedule": "zero_bubble"}, ("mlstm",)),
    },
    8: {
        "pp x fsdp x tp": (TP | {"pp": 2}, ("mlstm", "looped")),
        "hsdp x tp": (TP | {"dp_replicate": 2}, ("hybrid",)),
        "pp 4 x tp": (TP | {"pp": 4}, ("mlstm",)),
    },
}
CALM = {
    2: {"tp": (TP, ("calm mlstm", "looped", "hybrid", "para_gru"))},
    4: {
        "fsdp x tp": (TP, ("calm mlstm", "looped")),
        "pp x tp": (TP | {"pp": 2}, ("calm mlstm", "hybrid", "para_gru")),
    },
    8: {"pp x fsdp x tp": (TP | {"pp": 2}, ("hybrid",))},
}


def cases(meshes: dict[str, tuple[Parallel, tuple[str, ...]]]) -> Cases:
    return {
        f"{name}: {model}": (model, parallel)
        for name, (parallel, models) in meshes.items()
        for model in models
    }


def names(meshes: dict[int, Any]) -> list[tuple[int, str]]:
    return [(size, name) for size, of_size in meshes.items() for name in cases(of_size)]


@cache
def alone(precision: str) -> dict[str, Any]:
    meshes = (MESHES if precision == "float64" else CALM).values()
    return train_alone({model for m in meshes for model, _ in cases(m).values()}, precision)


@cache
def on_ranks(size: int, precision: str) -> list[dict[str, Any]]:
    meshes = MESHES if precision == "float64" else CALM
    return run_ranks(train, size, cases(meshes[size]), precision)


@pytest.mark.parametrize(("size", "name"), names(MESHES))
def test_equals_one_process_in_float64(size: int, name: str) -> None:
    model, _ = cases(MESHES[size])[name]
    ours = [rank[name] for rank in on_ranks(size, "float64")]
    expected = alone("float64")[model]
    assert max(errors(ours, expected)) < 1e-11
    if size == 2:  # More data ranks than one look at other rows too.
        valid = sum(rank["valid"] for rank in ours)
        assert valid == pytest.approx(expected["valid"], rel=1e-11)


@pytest.mark.parametrize(("size", "name"), names(CALM))
def test_equals_one_process_in_float32(size: int, name: str) -> None:
    model, _ = cases(CALM[size])[name]
    ours = [rank[name] for rank in on_ranks(size, "float32")]
    first, *later = errors(ours, alone("float32")[model])
    assert first < 1e-6
    assert max(later) < 1e-5
