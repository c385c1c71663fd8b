"""What decoding keeps of a looped core: the states of its blocks, recurrence by recurrence."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megarec.config.stack import CacheConfig
from megarec.errors import UserError
from megarec.models.stack import Inherit
from megarec.models.state import State, prefixed, sub_state


class DepthCache:
    """The states of one run of the loop, kept as CacheConfig says.

    Recurrence i of block j of the core reads slot i mod `num_slots` as it was before the tokens of
    this run, and writes it. A model's state holds `core.{j}.<key>`, (B, num_slots, ...).

    Args:
        config: what to keep.
        core: indices of the core's blocks.
        state: the model's, before the tokens; None at a start.
        num_recurrences: of this run, at most.

    Raises:
        UserError: a state of another number of recurrences.
    """

    def __init__(
        self, config: CacheConfig, core: range, state: State | None, num_recurrences: int
    ) -> None:
        self.core = core
        self.num_slots = config.num_slots(num_recurrences)
        self._before: list[State] | None = None
        if state is not None:
            self._before = [sub_state(state, f"core.{j}.") or {} for j in range(len(core))]
            held = {tensor.shape[1] for block in self._before for tensor in block.values()}
            self.num_slots = max(held, default=self.num_slots)
            _check(config, self.num_slots, num_recurrences)
        self._after: list[Sequence[State]] = [()] * self.num_slots
        self._written_B: list[Tensor | None] = [None] * self.num_slots
        self._deepest: Sequence[State] = ()

    def before(self, recurrence: int) -> list[State] | None:
        """Return the state that each block of the core reads in a recurrence."""
        if self._before is None:
            return None
        slot = recurrence % self.num_slots
        return [{key: x[:, slot] for key, x in block.items()} for block in self._before]

    def write(self, recurrence: int, states: Sequence[State], rows_B: Tensor) -> None:
        """Take the states after a recurrence, of the rows where rows_B, bool, is True."""
        slot = recurrence % self.num_slots
        written_B = self._written_B[slot]
        self._written_B[slot] = rows_B if written_B is None else rows_B | written_B
        self._after[slot] = _choose(rows_B, states, self._after[slot])
        self._deepest = _choose(rows_B, states, self._deepest)

    def fill(self, inherit: Inherit, num_tokens: int) -> None:
        """Let slots that some rows did not reach inherit from their deepest recurrence."""
        for slot, written_B in enumerate(self._written_B):
            if written_B is not None and bool(written_B.all()):
                continue
            before = self.before(slot)
            inherited = [
                inherit(i, None if before is None else before[j], self._deepest[j], num_tokens)
                for j, i in enumerate(self.core)
            ]
            if written_B is None:
                self._after[slot] = inherited
            else:
                self._after[slot] = _choose(written_B, self._after[slot], inherited)

    def state(self) -> State:
        """Return the part of the model's state that the core makes."""
        state: State = {}
        for j in range(len(self.core)):
            slots = [states[j] for states in self._after]
            stacked = {key: torch.stack([slot[key] for slot in slots], 1) for key in slots[0]}
            state |= prefixed(stacked, f"core.{j}.")
        return state


def _check(config: CacheConfig, held: int, num_recurrences: int) -> None:
    if config.type == "full" and num_recurrences != held:
        raise UserError(
            f"num_recurrences={num_recurrences}: the state holds {held} recurrences of every token "
            "(cache: full); for depths that vary the model needs cache type latest or modulo"
        )
    if config.type == "latest" and num_recurrences > held:
        raise UserError(
            f"num_recurrences={num_recurrences}: the state holds {held} at most; give init_state "
            "the largest number"
        )


def _choose(rows_B: Tensor, new: Sequence[State], old: Sequence[State]) -> Sequence[State]:
    """Take new states where rows_B is True, old ones elsewhere; there may be no old ones."""
    if not old:
        return new
    return [
        {
            key: torch.where(rows_B.view(-1, *[1] * (x.dim() - 1)), x, before[key])
            for key, x in block.items()
        }
        for block, before in zip(new, old, strict=True)
    ]
