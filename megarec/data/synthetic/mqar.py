"""Multi-query associative recall (Zoology, arXiv 2312.04927)."""

from typing import Any, Literal

import numpy as np

from megarec.config.base import PositiveFloat, PositiveInt
from megarec.data.sample import IGNORED
from megarec.data.synthetic.task import Ids, Task, TaskSample


class MQAR(Task):
    """Key-value pairs, then each key once more, at a place drawn by a power law: recall its value.

    Ids: 0 filler, keys in [1, V/2), values in [V/2, V). ``power`` is the exponent a of
    P(g) ~ (g + 1)^(a - 1) for the distance g, in pairs, of a query. ``random_fill`` draws the
    filler from all ids; ``dense`` repeats (query, answer) pairs instead, queries uniform.
    """

    type: Literal["mqar"] = "mqar"
    vocab_size: PositiveInt = 256
    num_pairs: PositiveInt = 8
    power: PositiveFloat = 0.01
    random_fill: bool = False
    dense: bool = False

    @property
    def num_ids(self) -> int:
        """Filler, keys and values."""
        return self.vocab_size

    @property
    def chance(self) -> float:
        """One value out of all."""
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def problems(self, length: int) -> list[str]:
        """Keys must be distinct, and pairs and queries must fit."""
        problems = []
        if self.vocab_size // 2 - 1 < self.num_pairs:
            problems.append(
                f"vocab_size={self.vocab_size}: num_pairs={self.num_pairs} distinct keys need at "
                f"least {2 * self.num_pairs + 2}"
            )
        if length % 2 or length < 4 * self.num_pairs:
            problems.append(
                f"length {length}: num_pairs={self.num_pairs} needs an even length of at least "
                f"{4 * self.num_pairs}"
            )
        return problems

    def draw(self, rng: np.random.Generator, length: int) -> TaskSample:
        """Draw keys and values without replacement, then the queries."""
        half = self.vocab_size // 2
        keys = 1 + rng.choice(half - 1, size=self.num_pairs, replace=False)
        values = half + rng.choice(self.vocab_size - half, size=self.num_pairs, replace=False)
        context = 2 * self.num_pairs
        space = (length - context) // 2
        input_ids = rng.integers(self.vocab_size, size=length) * self.random_fill
        input_ids[0:context:2], input_ids[1:context:2] = keys, values
        labels = np.full(length, IGNORED)
        if self.dense:
            asked = rng.integers(self.num_pairs, size=space)
            places = context + 2 * np.arange(space)
            input_ids[places + 1] = values[asked]
        else:
            weight = (np.arange(space) + 1.0) ** (self.power - 1)
            asked = np.arange(self.num_pairs)
            places = context + 2 * rng.choice(
                space, size=self.num_pairs, replace=False, p=weight / weight.sum()
            )
        input_ids[places] = keys[asked]
        labels[places] = values[asked]
        meta = {"input_ids": input_ids, "num_pairs": self.num_pairs, "queries": places}
        return TaskSample(input_ids=input_ids, labels=labels, meta=meta)

    def oracle(self, meta: dict[str, Any]) -> Ids:
        """Look each query up in the pairs."""
        input_ids = meta["input_ids"].tolist()
        context = 2 * meta["num_pairs"]
        values = dict(zip(input_ids[0:context:2], input_ids[1:context:2], strict=True))
        answers = np.full(len(input_ids), IGNORED)
        for place in meta["queries"]:
            answers[place] = values[input_ids[place]]
        return answers
