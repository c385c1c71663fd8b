"""Cells, golden vectors and random inputs shared by the tests of newton_rnn."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gla_cases import cast
from megarec_kernels.newton_rnn import Cell, ParaGRUCell, ParaLSTMCell, newton_rnn
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden/pararnn"


class Gated(Cell):
    """A diagonal cell of two slots, without a closed form: each slot forgets at its own rate."""

    num_slots = 2
    num_inputs = 3
    recurrent = {"A": 2, "rate": 1}

    def step(self, state, u, params):
        gate = torch.sigmoid(params["rate"] * state + u[..., :1, :])
        return gate * state + (1 - gate) * torch.tanh(params["A"] * state + u[..., 1:, :])


class DenseHead(Cell):
    """tanh(R h' + u), a K x K matrix R a head: the heads are the channels, their dims the slots."""

    num_slots = num_inputs = 5
    recurrent = {"R": 25}
    structure = "block"

    def step(self, state, u, params):
        R_KKH = params["R"].unflatten(0, (5, 5))
        return torch.tanh(torch.einsum("ijh,...jh->...ih", R_KKH, state) + u)


CELLS = {"gru": ParaGRUCell(), "lstm": ParaLSTMCell(), "gated": Gated(), "dense": DenseHead()}


class Golden:
    """A golden file (float64): inputs, and what the recurrence gives for them."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            self.arrays = {key: torch.from_numpy(arrays[key]) for key in arrays}
        self.cell = CELLS["lstm" if "C" in self.arrays else "gru"]
        # The names of the arrays that are differentiated: x, A, b, B and C.
        self.leaves = [key for key in ("x", "A", "b", "B", "C") if key in self.arrays]

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def run(
        self, dtype: torch.dtype, *, map_dtype: torch.dtype | None = None, **options: Any
    ) -> tuple[dict[str, Tensor], Any]:
        """Return y, the states and every gradient, from inputs in this dtype; and the report.

        The map from x to u, which is no part of the op, may be computed in another dtype.
        """
        leaves = cast({key: self[key] for key in self.leaves}, map_dtype or dtype)
        leaves = {key: x.requires_grad_() for key, x in leaves.items()}
        x_BTHI = leaves["x"].unflatten(-1, (leaves["B"].shape[0], -1))
        u_BTVD = torch.einsum("bthi,hivd->btvhd", x_BTHI, leaves["B"]).flatten(-2) + leaves["b"]
        params = {key: leaves[key].to(dtype) for key in self.cell.recurrent}
        h_BTKD, _, report = newton_rnn(self.cell, u_BTVD.to(dtype), params, **options)
        y_BTD = self.cell.output(h_BTKD)
        gradients = torch.autograd.grad(y_BTD, list(leaves.values()), self["dy"].to(y_BTD.dtype))
        results = {"y": y_BTD.detach(), "h": h_BTKD.detach()}
        results |= {f"d{key}": g for key, g in zip(leaves, gradients, strict=True)}
        return results, report


def make_inputs(
    cell: Cell, B: int = 2, T: int = 13, D: int = 3, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Return random u, params (uniform within 0.5) and state for a cell, drawn in float64."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=rng, dtype=torch.float64) - 1).to(dtype)

    return {
        "u": 2 * draw(B, T, cell.num_inputs, D),
        "params": {key: draw(rows, D) / 2 for key, rows in cell.recurrent.items()},
        "state": draw(B, cell.num_slots, D),
    }
