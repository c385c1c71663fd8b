"""What a synthetic task is, and the registry of tasks."""

import importlib
import pkgutil
from abc import abstractmethod
from typing import Any, ClassVar, Literal, TypedDict

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megarec.config.base import Registered
from megarec.data.rng import generator
from megarec.errors import UserError

Split = Literal["train", "valid", "test"]
Ids = npt.NDArray[np.int64]


class TaskSample(TypedDict):
    """One sequence: ``input_ids`` and ``labels`` (-100: not asked) int64 (T,); ``meta``."""

    input_ids: Ids
    labels: Ids
    meta: dict[str, Any]


class Task(Registered):
    """A task of given sizes, its fields: a seeded generator of labelled sequences.

    Calling it with (seed, split, length) gives a TaskSample. A label is the answer at its own
    position, so that next-token loss without a shift trains it. Tasks never touch the global
    random state, and no two splits share a generator.
    """

    kind: ClassVar[str] = "synthetic task"

    @classmethod
    def discover(cls) -> None:
        """Import every module of this package."""
        package = importlib.import_module("megarec.data.synthetic")
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)

    def __call__(self, seed: int, split: Split, length: int) -> TaskSample:
        """Return the sequence of a seed."""
        return self.draw(generator("synthetic", self.type, split, seed), length)

    @property
    @abstractmethod
    def num_ids(self) -> int:
        """One more than the largest id in inputs and labels: the smallest vocabulary."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """The accuracy of guessing among the possible answers."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, length: int) -> TaskSample:
        """Draw one sequence of ``length`` tokens."""

    @abstractmethod
    def oracle(self, meta: dict[str, Any]) -> npt.NDArray[Any]:
        """Solve a sequence from its meta, by another way than ``draw``.

        Gives the answers, int64 (T,) with -100 where nothing is asked; a task that is not
        deterministic gives log-probabilities, float64 (T, num_ids).
        """

    def problems(self, length: int) -> list[str]:
        """Say why sequences of this length cannot be made, one line each; empty if they can."""
        return []


def make_task(name: str, **sizes: int | float | bool | str) -> Task:
    """Return a task by name; raises UserError for an unknown name or bad sizes, all at once."""
    try:
        return Task.model_validate({**sizes, "type": name})
    except ValidationError as error:
        raise UserError(*(_describe(name, problem) for problem in error.errors())) from error


def _describe(name: str, problem: ErrorDetails) -> str:
    where = ".".join(["synthetic", *map(str, problem["loc"])])
    task = Task.member(name)
    if task is None:
        return f"{where}: {problem['msg']}"
    if problem["type"] == "extra_forbidden":
        sizes = sorted(set(task.model_fields) - {"type"})
        return f"{where}: unknown; '{name}' has: {', '.join(sizes)}"
    return f"{where}: {problem['msg']}, got {problem['input']!r}"
