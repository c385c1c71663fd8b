"""Nested logic: evaluate a Boolean expression of a given depth (arXiv 2603.21676)."""

from functools import cache
from typing import Any, Literal

import numpy as np

from megarec.config.base import PositiveInt
from megarec.data.sample import IGNORED
from megarec.data.synthetic.task import Ids, Task, TaskSample

NOT, AND, OR, EQUALS, FILLER = range(2, 7)


class NestedLogic(Task):
    """Expressions in prefix order, each closed by =, where its value is asked.

    An expression's depth is uniform from ``min_depth`` to ``max_depth``, and exact: an inner node
    of depth d draws !, & or |; one operand has depth d - 1, the other one (on either side) a
    uniform depth below d. Leaves are 0 or 1. As many expressions follow each other as fit, so that
    long ones are a little rarer than drawn; filler ends the sequence. Half of the values are 1.

    Ids: 0, 1, !, &, |, =, filler.
    """

    type: Literal["nested_logic"] = "nested_logic"
    min_depth: PositiveInt = 1
    max_depth: PositiveInt = 4

    @property
    def num_ids(self) -> int:
        """Both values, three operators, = and filler."""
        return FILLER + 1

    @property
    def chance(self) -> float:
        """One value of two."""
        return 1 / 2

    def problems(self, length: int) -> list[str]:
        """Depths must be in order; most expressions must fit."""
        problems = []
        if self.min_depth > self.max_depth:
            problems.append(
                f"min_depth={self.min_depth} exceeds max_depth={self.max_depth}; swap them"
            )
        needed = round(2 * (mean_size(self.max_depth) + 1))
        if length < needed:
            problems.append(
                f"length {length}: max_depth={self.max_depth} needs at least {needed}, twice the "
                "mean length of its expressions"
            )
        return problems

    def draw(self, rng: np.random.Generator, length: int) -> TaskSample:
        """Draw expressions until one does not fit any more; the first that fits is always kept."""
        input_ids = np.full(length, FILLER)
        labels = np.full(length, IGNORED)
        used = 0
        while True:
            depth = int(rng.integers(self.min_depth, self.max_depth + 1))
            tokens, value = _expression(rng, depth)
            end = used + len(tokens)
            if end < length:
                input_ids[used : end + 1] = [*tokens, EQUALS]
                labels[end] = value
                used = end + 1
            elif used:
                break
        return TaskSample(input_ids=input_ids, labels=labels, meta={"input_ids": input_ids})

    def oracle(self, meta: dict[str, Any]) -> Ids:
        """Evaluate each expression from its end, with a stack of values."""
        answers = np.full(len(meta["input_ids"]), IGNORED)
        values: list[int] = []
        for t in range(len(answers) - 1, -1, -1):
            token = meta["input_ids"][t]
            if token == EQUALS:
                end = t
            elif token == NOT:
                values.append(1 - values.pop())
            elif token in (AND, OR):
                pair = values.pop(), values.pop()
                values.append(min(pair) if token == AND else max(pair))
            elif token != FILLER:
                values.append(token)
            if values and (t == 0 or meta["input_ids"][t - 1] == EQUALS):
                answers[end] = values.pop()
        return answers


def _expression(rng: np.random.Generator, depth: int) -> tuple[list[int], int]:
    if depth == 0:
        leaf = int(rng.integers(2))
        return [leaf], leaf
    operator = int(rng.integers(NOT, OR + 1))
    if operator == NOT:
        tokens, value = _expression(rng, depth - 1)
        return [NOT, *tokens], 1 - value
    depths = [depth - 1, int(rng.integers(depth))]
    rng.shuffle(depths)
    (left, a), (right, b) = (_expression(rng, below) for below in depths)
    return [operator, *left, *right], a & b if operator == AND else a | b


@cache
def mean_size(depth: int) -> float:
    """Return the mean number of nodes of an expression of this depth."""
    if depth == 0:
        return 1.0
    below = [mean_size(d) for d in range(depth)]
    return 1 + below[-1] + 2 / 3 * sum(below) / depth
