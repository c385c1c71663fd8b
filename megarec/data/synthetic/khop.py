"""k-hop questions, whose answer needs k look-ups one after the other (arXiv 2604.07822)."""

from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from megarec.config.base import NonNegativeInt, PositiveInt
from megarec.data.rng import generator
from megarec.data.sample import IGNORED
from megarec.data.synthetic.task import Ids, Task, TaskSample


class KHop(Task):
    """Queries ``e r1 .. rk``, one behind the other: f_rk(.. f_r1(e)), asked at rk only.

    A relation r is a function f_r on the entities, one random cycle through all of them, so that
    all answers are equally likely. Each query draws its k from ``min_hops`` to ``max_hops``, its
    entity and its relations uniformly. The functions are to be memorised: ``function_seed`` names
    them, and all seeds and splits share them. With ``in_context`` a sequence has functions of its
    own and begins with all facts ``e r f_r(e)``, shuffled: much harder to learn.

    Ids: entities from 0, relations, filler (behind the queries).
    """

    type: Literal["khop"] = "khop"
    num_entities: PositiveInt = 16
    num_relations: PositiveInt = 8
    min_hops: PositiveInt = 1
    max_hops: PositiveInt = 4
    num_queries: PositiveInt = 8
    in_context: bool = False
    function_seed: NonNegativeInt = 0

    @property
    def num_ids(self) -> int:
        """Entities, relations and filler."""
        return self.num_entities + self.num_relations + 1

    @property
    def chance(self) -> float:
        """One entity out of all."""
        return 1 / self.num_entities

    @property
    def num_facts(self) -> int:
        """The facts at the beginning of a sequence."""
        return self.num_entities * self.num_relations * self.in_context

    @property
    def functions(self) -> Ids:
        """The functions to be memorised, (relations, entities)."""
        return _functions(self.num_entities, self.num_relations, self.function_seed)

    def problems(self, length: int) -> list[str]:
        """Hops must be in order and lead away from the start; facts and queries must fit."""
        problems = []
        if self.min_hops > self.max_hops:
            problems.append(f"min_hops={self.min_hops} exceeds max_hops={self.max_hops}; swap them")
        if self.num_relations == 1 and self.max_hops >= self.num_entities:
            problems.append(
                f"max_hops={self.max_hops}: with one relation {self.num_entities} hops lead back "
                f"to the start; expected less than num_entities={self.num_entities}"
            )
        needed = 3 * self.num_facts + self.num_queries * (self.max_hops + 1)
        if length < needed:
            problems.append(
                f"length {length}: {self.num_facts} facts and {self.num_queries} queries of "
                f"{self.max_hops} hops need at least {needed}; lower num_queries, say"
            )
        return problems

    def draw(self, rng: np.random.Generator, length: int) -> TaskSample:
        """Draw the functions, if they are not to be memorised, then the queries."""
        size, count = self.num_entities, self.num_relations
        functions = _cycles(rng, size, count) if self.in_context else self.functions
        input_ids = np.full(length, self.num_ids - 1)
        labels = np.full(length, IGNORED)
        used = 3 * self.num_facts
        if self.in_context:
            relation, entity = np.divmod(rng.permutation(self.num_facts), size)
            facts = [entity, size + relation, functions[relation, entity]]
            input_ids[:used] = np.stack(facts, axis=1).ravel()
        hops = rng.integers(self.min_hops, self.max_hops + 1, size=self.num_queries)
        entities = rng.integers(size, size=self.num_queries)
        relations = rng.integers(count, size=(self.num_queries, self.max_hops))
        for k, entity, path in zip(hops, entities, relations, strict=True):
            input_ids[used] = entity
            input_ids[used + 1 : used + 1 + k] = size + path[:k]
            for relation in path[:k]:
                entity = functions[relation, entity]
            used += 1 + k
            labels[used - 1] = entity
        return TaskSample(
            input_ids=input_ids,
            labels=labels,
            meta={"input_ids": input_ids, "num_facts": self.num_facts},
        )

    def oracle(self, meta: dict[str, Any]) -> Ids:
        """Read the facts, then the tokens one by one, where each relation moves on."""
        input_ids, context = meta["input_ids"].tolist(), 3 * meta["num_facts"]
        size, filler = self.num_entities, self.num_ids - 1
        if context:
            triples = zip(*(input_ids[i:context:3] for i in range(3)), strict=True)
            found = {(entity, relation): value for entity, relation, value in triples}
        else:
            found = {(e, size + r): int(value) for (r, e), value in np.ndenumerate(self.functions)}
        answers = np.full(len(input_ids), IGNORED)
        place = filler
        for t, (token, after) in enumerate(pairwise([*input_ids[context:], filler]), context):
            if token < size:
                place = token
            elif token < filler:
                place = found[place, token]
                if not size <= after < filler:
                    answers[t] = place
        return answers


def _cycles(rng: np.random.Generator, size: int, count: int) -> Ids:
    orders = rng.permuted(np.tile(np.arange(size), (count, 1)), axis=1)
    functions = np.empty_like(orders)
    np.put_along_axis(functions, orders, np.roll(orders, -1, axis=1), axis=1)
    return functions


@cache
def _functions(size: int, count: int, seed: int) -> Ids:
    return _cycles(generator("khop functions", size, count, seed), size, count)
