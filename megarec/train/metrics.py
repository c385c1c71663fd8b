"""Numbers that only some ranks have, such as those of the layers of one pipeline stage."""

import json
import math
from typing import Any

import torch.distributed as dist

from megarec.train.environment import Environment


class Largest:
    """The largest of each named number over the ranks that have it.

    The names are gathered again only when a rank has a new one.
    """

    def __init__(self, env: Environment) -> None:
        self._env = env
        self._names: list[str] = []

    def over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        """Return the largest numbers, on every rank (collective)."""
        if self._env.max([float(not values.keys() <= set(self._names))])[0]:
            found: list[Any] = [None] * self._env.world_size
            dist.all_gather_object(found, json.dumps(list(values)))
            names = [name for text in found for name in json.loads(text)]
            self._names = list(dict.fromkeys([*self._names, *names]))
        if not self._names:
            return {}
        largest = self._env.max([values.get(name, -math.inf) for name in self._names])
        pairs = zip(self._names, largest, strict=True)
        return {name: value for name, value in pairs if value > -math.inf}
