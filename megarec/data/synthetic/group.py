"""State tracking: the running product of group elements (arXiv 2404.08819, 2411.12537)."""

from functools import cache
from itertools import permutations
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from megarec.data.synthetic.task import Ids, Task, TaskSample

Permutation = tuple[int, ...]


class Group(Task):
    """Inputs x_t are elements of a group, labels the products p_t = x_t * p_(t-1), at every t.

    ``group``: ``z<k>`` (integers mod k; z2 is parity), ``s<n>`` or ``a<n>`` (all or the even
    permutations of n <= 5 things; (x * g)(i) = x(g(i))). Ids number the elements, the identity
    first. With ``generators`` the inputs of s<n> are one transposition and one n-cycle only.
    """

    type: Literal["group"] = "group"
    group: Annotated[str, Field(pattern=r"^(z([2-9]|[1-9]\d{1,2})|[sa][345])$")] = "s5"
    generators: bool = False

    @property
    def num_ids(self) -> int:
        """The order of the group."""
        return len(elements(self.group))

    @property
    def chance(self) -> float:
        """One element out of all."""
        return 1 / self.num_ids

    def problems(self, length: int) -> list[str]:
        """Only symmetric groups have the two generators."""
        if self.generators and not self.group.startswith("s"):
            return [f"generators: true is for s3, s4 and s5, got group {self.group}"]
        return []

    def draw(self, rng: np.random.Generator, length: int) -> TaskSample:
        """Draw the elements uniformly and multiply them by table."""
        inputs = generator_ids(self.group) if self.generators else range(self.num_ids)
        input_ids = rng.choice(np.asarray(inputs, dtype=np.int64), size=length)
        table = multiplication_table(self.group)
        labels = np.empty(length, dtype=np.int64)
        product = 0
        for t, x in enumerate(input_ids):
            product = labels[t] = table[x, product]
        return TaskSample(
            input_ids=input_ids, labels=labels, meta={"input_ids": input_ids, "group": self.group}
        )

    def oracle(self, meta: dict[str, Any]) -> Ids:
        """Compose the permutations themselves."""
        members = elements(meta["group"])
        number = {member: i for i, member in enumerate(members)}
        product = members[0]
        answers = []
        for x in meta["input_ids"]:
            product = compose(members[x], product)
            answers.append(number[product])
        return np.array(answers, dtype=np.int64)


class Parity(Group):
    """Parity of the ones so far: the group z2."""

    type: Literal["parity"] = "parity"  # type: ignore[assignment]
    group: Literal["z2"] = "z2"


def compose(x: Permutation, g: Permutation) -> Permutation:
    """Return x * g, that is i -> x(g(i))."""
    return tuple(x[i] for i in g)


@cache
def elements(group: str) -> list[Permutation]:
    """Return a group's elements as permutations, the identity first."""
    size = int(group[1:])
    if group.startswith("z"):
        return [tuple((i + shift) % size for i in range(size)) for shift in range(size)]
    everything = list(permutations(range(size)))
    return everything if group.startswith("s") else [p for p in everything if _is_even(p)]


@cache
def multiplication_table(group: str) -> Ids:
    """Return the number of x * g for each x and g, int64 (order, order)."""
    members = elements(group)
    number = {member: i for i, member in enumerate(members)}
    return np.array([[number[compose(x, g)] for g in members] for x in members], dtype=np.int64)


def generator_ids(group: str) -> list[int]:
    """Return the numbers of (0 1) and of the cycle i -> i + 1, which generate s<n>."""
    size = int(group[1:])
    transposition = (1, 0, *range(2, size))
    cycle = (*range(1, size), 0)
    return [elements(group).index(transposition), elements(group).index(cycle)]


def _is_even(p: Permutation) -> bool:
    inversions = sum(p[i] > p[j] for j in range(len(p)) for i in range(j))
    return inversions % 2 == 0
