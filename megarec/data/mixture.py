"""Mix sources by weight: sample i -> (source, index within the source), without a table."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megarec.data.rng import generator

SAMPLES_OF_RAREST = 16
"""A block holds about this many samples of the source with the smallest weight."""

UNITS = 1 << 40
"""Weights are rounded to this resolution, so that all counting is exact in integers."""


class Block(NamedTuple):
    """One block: the source of each of its samples, and each source's samples before it."""

    number: int
    slots: npt.NDArray[np.int64]
    starts: list[int]


class Mixture:
    """The order in which sources are visited.

    Blocks have one size; within a block the order is a seeded permutation. At each block's start
    a source has had its share of the samples so far, rounded (to less than 1 from exact), and its
    samples are visited in order, each once.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        units = [round(weight * UNITS) for weight in weights]
        self._bounds = [sum(units[:k]) for k in range(len(units) + 1)]
        self._seed = seed
        smallest = min(unit for unit in units if unit)
        self.block_size = -(-SAMPLES_OF_RAREST * self._bounds[-1] // smallest)
        self._block = self._make_block(0)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the source of a sample, by position in ``weights``, and its index there."""
        number, place = divmod(index, self.block_size)
        if number != self._block.number:
            self._block = self._make_block(number)
        source = int(self._block.slots[place])
        before = int(np.count_nonzero(self._block.slots[:place] == source))
        return source, self._block.starts[source] + before

    def _visited(self, num_samples: int) -> list[int]:
        """Return how many of the first samples each source has: rounded cumulative shares."""
        total = self._bounds[-1]
        edges = [(2 * num_samples * bound + total) // (2 * total) for bound in self._bounds]
        return [after - before for before, after in zip(edges[:-1], edges[1:], strict=True)]

    def _make_block(self, number: int) -> Block:
        starts = self._visited(number * self.block_size)
        stops = self._visited((number + 1) * self.block_size)
        counts = np.subtract(stops, starts)
        slots = np.repeat(np.arange(len(counts)), counts)
        return Block(number, generator(self._seed, "mixture", number).permutation(slots), starts)
