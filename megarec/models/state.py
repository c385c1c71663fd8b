"""Recurrent state of a model: a flat dict of tensors, batch first, with names that say where."""

from torch import Tensor

State = dict[str, Tensor]


def sub_state(state: State | None, prefix: str) -> State | None:
    """Return the entries below a prefix, without it; None stays None."""
    if state is None:
        return None
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def prefixed(state: State, prefix: str) -> State:
    """Return the state with every name behind a prefix."""
    return {prefix + key: value for key, value in state.items()}
