"""Mixtures: exact proportions, each sample of a source exactly once and in order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.data.mixture import Mixture


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.integers(0, 100),
)
def test_proportions_and_order(shares: list[int], seed: int) -> None:
    weights = np.array(shares) / sum(shares)
    mixture = Mixture(weights.tolist(), seed)
    seen = [0] * len(shares)
    for i in range(2 * mixture.block_size):
        source, index = mixture.locate(i)
        assert index == seen[source]
        seen[source] += 1
        if (i + 1) % mixture.block_size == 0:
            assert np.abs(np.array(seen) - (i + 1) * weights).max() < 1


def test_long_run_proportions_are_exact() -> None:
    mixture = Mixture([0.7, 0.2999, 0.0001], seed=3)
    number = 10**9
    source, index = mixture.locate(number * mixture.block_size)
    weight = [0.7, 0.2999, 0.0001][source]
    assert abs(index - weight * number * mixture.block_size) < mixture.block_size * 1e-3


def test_random_access_equals_order() -> None:
    weights = [0.5, 0.3, 0.2]
    forward = [Mixture(weights, 1).locate(i) for i in range(300)]
    mixture = Mixture(weights, 1)
    assert [mixture.locate(i) for i in reversed(range(300))] == forward[::-1]
    assert [Mixture(weights, 2).locate(i) for i in range(300)] != forward


def test_blocks_are_mixed_and_differ() -> None:
    mixture = Mixture([0.5, 0.5], 0)
    size = mixture.block_size
    blocks = [[mixture.locate(b * size + i)[0] for i in range(size)] for b in range(2)]
    assert blocks[0] != blocks[1] and blocks[0] != sorted(blocks[0])


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0]])
def test_a_single_source_is_read_in_order(weights: list[float]) -> None:
    mixture = Mixture(weights, 0)
    assert [mixture.locate(i) for i in range(40)] == [(0, i) for i in range(40)]
