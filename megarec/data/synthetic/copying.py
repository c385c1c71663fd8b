"""Copying tasks: copy, selective copy (arXiv 2312.00752) and induction heads (same paper)."""

from typing import Any, Literal

import numpy as np

from megarec.config.base import PositiveInt
from megarec.data.sample import IGNORED
from megarec.data.synthetic.task import Ids, Task, TaskSample


class Copy(Task):
    """BOS x_1 .. x_L SEP x_1 .. x_L, with next-token labels after SEP; L = (T - 1) // 2.

    Ids: symbols from 0, BOS, SEP. An even T ends in one BOS without a label.
    """

    type: Literal["copy"] = "copy"
    num_symbols: PositiveInt = 16

    @property
    def num_ids(self) -> int:
        """Symbols, BOS and SEP."""
        return self.num_symbols + 2

    @property
    def chance(self) -> float:
        """One symbol out of all."""
        return 1 / self.num_symbols

    def problems(self, length: int) -> list[str]:
        """Need BOS, a symbol and SEP."""
        return [] if length >= 3 else [f"length {length}: copy needs at least 3"]

    def draw(self, rng: np.random.Generator, length: int) -> TaskSample:
        """Draw the symbols uniformly."""
        bos, sep = self.num_symbols, self.num_symbols + 1
        symbols = rng.integers(self.num_symbols, size=(length - 1) // 2)
        input_ids = np.full(length, bos)
        labels = np.full(length, IGNORED)
        used = 2 * len(symbols) + 1
        input_ids[:used] = np.concatenate([[bos], symbols, [sep], symbols[:-1]])
        labels[len(symbols) + 1 : used] = symbols
        return TaskSample(
            input_ids=input_ids, labels=labels, meta={"input_ids": input_ids, "sep": sep}
        )

    def oracle(self, meta: dict[str, Any]) -> Ids:
        """Read, from SEP on, what lies that far behind."""
        input_ids = meta["input_ids"]
        sep = int(np.argmax(input_ids == meta["sep"]))
        answers = np.full(len(input_ids), IGNORED)
        answers[sep : 2 * sep - 1] = input_ids[1:sep]
        return answers


class SelectiveCopy(Task):
    """T - M positions of noise with M symbols scattered in them, then M slots for the answers.

    Ids: symbols from 0, noise, slot.
    """

    type: Literal["selective_copy"] = "selective_copy"
    num_symbols: PositiveInt = 16
    num_data: PositiveInt = 8

    @property
    def num_ids(self) -> int:
        """Symbols, noise and slot."""
        return self.num_symbols + 2

    @property
    def chance(self) -> float:
        """One symbol out of all."""
        return 1 / self.num_symbols

    def problems(self, length: int) -> list[str]:
        """Data and answers must fit."""
        if length >= 2 * self.num_data:
            return []
        return [f"length {length}: num_data={self.num_data} needs at least {2 * self.num_data}"]

    def draw(self, rng: np.random.Generator, length: int) -> TaskSample:
        """Draw symbols and their places uniformly."""
        noise, slot = self.num_symbols, self.num_symbols + 1
        body = length - self.num_data
        symbols = rng.integers(self.num_symbols, size=self.num_data)
        input_ids = np.full(length, noise)
        input_ids[rng.choice(body, size=self.num_data, replace=False)] = 0
        input_ids[np.flatnonzero(input_ids == 0)] = symbols
        input_ids[body:] = slot
        labels = np.full(length, IGNORED)
        labels[body:] = symbols
        return TaskSample(
            input_ids=input_ids,
            labels=labels,
            meta={"input_ids": input_ids, "noise": noise, "slot": slot},
        )

    def oracle(self, meta: dict[str, Any]) -> Ids:
        """Drop the noise and put what is left into the slots."""
        input_ids = meta["input_ids"]
        answers = np.full(len(input_ids), IGNORED)
        answers[input_ids == meta["slot"]] = input_ids[input_ids < meta["noise"]]
        return answers


class Induction(Task):
    """Random symbols; S occurs once, followed by x; the last token is S again: answer x.

    Ids: symbols from 0, S.
    """

    type: Literal["induction"] = "induction"
    num_symbols: PositiveInt = 16

    @property
    def num_ids(self) -> int:
        """Symbols and S."""
        return self.num_symbols + 1

    @property
    def chance(self) -> float:
        """One symbol out of all."""
        return 1 / self.num_symbols

    def problems(self, length: int) -> list[str]:
        """Need S x S."""
        return [] if length >= 3 else [f"length {length}: induction needs at least 3"]

    def draw(self, rng: np.random.Generator, length: int) -> TaskSample:
        """Draw symbols and the place of S uniformly."""
        special = self.num_symbols
        input_ids = rng.integers(self.num_symbols, size=length)
        place = int(rng.integers(length - 2))
        input_ids[[place, -1]] = special
        labels = np.full(length, IGNORED)
        labels[-1] = input_ids[place + 1]
        return TaskSample(input_ids=input_ids, labels=labels, meta={"input_ids": input_ids})

    def oracle(self, meta: dict[str, Any]) -> Ids:
        """Look for the last token earlier on and read what follows it."""
        input_ids = meta["input_ids"].tolist()
        answers = np.full(len(input_ids), IGNORED)
        answers[-1] = input_ids[input_ids.index(input_ids[-1]) + 1]
        return answers
