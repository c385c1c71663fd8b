"""The state of training that is no tensor."""

from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass
class TrainState:
    """Where a run stands; saved as JSON in every checkpoint.

    The random numbers of a run are functions of the seed and these counters (initial weights of
    the seed alone, data of `samples`), so that no generator state is kept.

    Attributes:
        step: optimizer steps made, skipped ones included.
        samples: position in the global sample order.
        tokens: predicted so far.
        skipped: steps skipped because something was not finite.
        skipped_in_a_row: of those, the latest without a good step between.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(**values)
