"""What a nonlinear cell is, its Jacobian, and the check that the Jacobian is what it declares."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.func import jvp

Params = Mapping[str, Tensor]
STRUCTURES = ("diagonal", "block")


class Cell(ABC):
    """A recurrence h_t = step(h_{t-1}, u_t, params) whose channels do not mix.

    A state is (..., K, D): K slots in each of D channels. With structure "diagonal" a slot of the
    new state depends on the same slot of the old one alone; with "block" on all slots of its
    channel. (Where state mixes inside a head, the heads are the channels, and K is the head dim.)

    Attributes:
        num_slots: K.
        num_inputs: V, how many numbers a channel gets from each token.
        recurrent: rows of each recurrent parameter (rows, D), by name.
        structure: of the Jacobian.
    """

    num_slots: ClassVar[int] = 1
    num_inputs: ClassVar[int] = 1
    recurrent: ClassVar[Mapping[str, int]] = {}
    structure: ClassVar[Literal["diagonal", "block"]] = "diagonal"

    @abstractmethod
    def step(self, state: Tensor, u: Tensor, params: Params) -> Tensor:
        """Return the new state, (..., K, D).

        Args:
            state: (..., K, D), of any leading dims.
            u: (..., V, D), what the inputs contribute.
            params: the recurrent parameters, by name.
        """

    def jacobian(self, state: Tensor, u: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return the new state and d new / d old: (..., K, D) or (..., new K, old K, D).

        By forward-mode differentiation, a pass a slot; override it with a closed form.
        """
        passes = [
            jvp(lambda old: self.step(old, u, params), (state,), (tangent,))
            for tangent in self._tangents(state)
        ]
        new, columns = passes[0][0], [outputs[1] for outputs in passes]
        return new, columns[0] if self.structure == "diagonal" else torch.stack(columns, -2)

    def output(self, state: Tensor) -> Tensor:
        """Return what a state (..., K, D) shows, (..., D): by default its last slot."""
        return state[..., -1, :]

    def _tangents(self, state: Tensor) -> list[Tensor]:
        if self.structure == "diagonal":
            return [torch.ones_like(state)]
        one_hot = torch.eye(self.num_slots, dtype=state.dtype, device=state.device)
        return [row[:, None].expand_as(state).contiguous() for row in one_hot]


def check_cell(cell: Cell) -> None:
    """Raise ValueError unless a cell's states and Jacobian are what it declares.

    The Jacobian is compared with a directional derivative along a random vector: a Jacobian of a
    wrong structure gives sums of its entries, which solve slowly or not at all. Numbers of the
    cell's own are drawn for it, in float64 on the CPU.
    """
    name = type(cell).__name__
    if cell.structure not in STRUCTURES:
        known = " or ".join(f"'{structure}'" for structure in STRUCTURES)
        raise ValueError(f"{name}: structure: got {cell.structure!r}, expected {known}")
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device="cpu") - 0.5

    rows, channels = 3, 4
    state, along = (random(rows, cell.num_slots, channels) for _ in range(2))
    u = random(rows, cell.num_inputs, channels)
    params = {key: random(count, channels) for key, count in cell.recurrent.items()}
    try:
        new, shown = cell.step(state, u, params), cell.output(state)
        beside, jacobian = cell.jacobian(state, u, params)
        _, derivative = jvp(lambda old: cell.step(old, u, params), (state,), (along,))[:2]
    except Exception as error:
        shapes = {key: tuple(value.shape) for key, value in params.items()}
        raise ValueError(
            f"{name}: fails for state {tuple(state.shape)}, u {tuple(u.shape)}, params {shapes}: "
            f"{error!r}"
        ) from error
    _require_shape(f"{name}: step", new, state.shape, f"{cell.num_slots} slots are declared")
    _require_shape(f"{name}: output", shown, u[:, 0].shape, "a number a channel")
    _require_shape(f"{name}: jacobian: new state", beside, new.shape, "what step returns")
    diagonal = cell.structure == "diagonal"
    shape = state.shape if diagonal else torch.Size([*state.shape[:2], *state.shape[1:]])
    _require_shape(f"{name}: jacobian", jacobian, shape, f"structure {cell.structure!r}")
    difference = (beside - new).abs().max().item()
    if not difference <= 1e-9:
        raise ValueError(
            f"{name}: jacobian: new state: differs by {difference:.2g} from what step returns"
        )
    product = jacobian * along if diagonal else torch.einsum("bijd,bjd->bid", jacobian, along)
    difference = (product - derivative).abs().max().item()
    if not difference <= 1e-9:
        raise ValueError(
            f"{name}: jacobian: differs from the derivative of step by {difference:.2g} along a "
            f"random vector: structure {cell.structure!r}, or its closed form, is wrong"
        )


def _require_shape(what: str, found: Tensor, expected: torch.Size, why: str) -> None:
    if found.shape != expected:
        raise ValueError(
            f"{what}: got shape {tuple(found.shape)}, expected {tuple(expected)}: {why}"
        )
