"""Depth distributions: Huginn's draws exactly, means, seeds, bad input."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from megarec.config.depth import (
    DepthConfig,
    FixedDepth,
    LognormalPoissonDepth,
    PoissonDepth,
    UniformDepth,
)

GOLDEN = np.load(Path(__file__).parents[2] / "golden/recurrent_depth/d_sampler.npz")
HUGINN_SEED = 514229


def split(depth: DepthConfig, step: int, backprop: int) -> tuple[int, int]:
    """Return the recurrences without and with a gradient."""
    r = depth.draw(0, step, backprop)
    return max(r - backprop, 0), min(r, backprop)


def test_huginns_draws() -> None:
    depth = LognormalPoissonDepth(mean=32, seed=HUGINN_SEED)
    found = [split(depth, int(step) - 1, 8) for step in GOLDEN["steps"]]
    assert found == list(zip(GOLDEN["n"].tolist(), GOLDEN["k"].tolist(), strict=True))


def test_huginns_draws_of_a_small_model() -> None:
    depth = LognormalPoissonDepth(mean=4, seed=HUGINN_SEED)
    found = [split(depth, step, 2) for step in range(len(GOLDEN["small"]))]
    assert found == [tuple(row) for row in GOLDEN["small"].tolist()]


@pytest.mark.parametrize(
    "depth",
    [
        LognormalPoissonDepth(mean=8),
        PoissonDepth(mean=4.5),
        UniformDepth(low=3, high=9),
        FixedDepth(num_recurrences=5),
    ],
    ids=lambda depth: depth.type,
)
def test_a_draw_depends_on_seed_and_step_alone(depth: DepthConfig) -> None:
    draws = [depth.draw(7, step, 4) for step in range(2000)]
    assert draws == [depth.draw(7, step, 4) for step in range(2000)]
    assert min(draws) >= 1
    assert np.mean(draws) == pytest.approx(depth.mean_recurrences(), rel=0.03)
    if depth.type != "fixed":
        assert draws[:100] != [depth.draw(8, step, 4) for step in range(100)]
    own = depth.model_copy(update={"seed": 7})
    assert draws[:100] == [own.draw(8, step, 4) for step in range(100)]


def test_uniform_reaches_both_ends_and_no_further() -> None:
    draws = {UniformDepth(low=2, high=4).draw(0, step, None) for step in range(200)}
    assert draws == {2, 3, 4}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"type": "uniform", "low": 5, "high": 3}, "low=5 exceeds high=3"),
        ({"type": "poisson", "mean": 0.5}, "greater than or equal to 1"),
        ({"type": "lognormal_poisson", "mean": 0}, "greater than or equal to 1"),
        ({"type": "normal"}, "unknown depth distribution type 'normal'"),
    ],
)
def test_bad_distributions(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DepthConfig.model_validate(tree)
