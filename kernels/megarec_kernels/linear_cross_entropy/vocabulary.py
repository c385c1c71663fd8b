"""A head whose vocabulary is divided over ranks."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VocabularyPart:
    """Which rows of the head's weight are here, and how to meet those who have the others.

    Attributes:
        first: the label of the first row.
        add: adds a tensor up over the ranks, in place; called without gradients.
        largest: takes the largest over the ranks, in place, likewise.
    """

    first: int
    add: Callable[[Tensor], Tensor]
    largest: Callable[[Tensor], Tensor]
