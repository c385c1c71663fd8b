"""Nonlinear recurrences solved for all tokens at once by Newton's method (arXiv 2510.21450)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megarec_kernels.dispatch import choose_backend
from megarec_kernels.newton_rnn.cell import Cell, check_cell
from megarec_kernels.newton_rnn.newton import Report, Solver, newton_rnn_eager
from megarec_kernels.newton_rnn.para_cells import ParaGRUCell, ParaLSTMCell
from megarec_kernels.newton_rnn.sequential import walk

__all__ = [
    "Cell",
    "ParaGRUCell",
    "ParaLSTMCell",
    "Report",
    "Solver",
    "check_cell",
    "newton_rnn",
]

FORMS = ("reference", "eager")


def newton_rnn(
    cell: Cell,
    u: Tensor,
    params: Mapping[str, Tensor],
    *,
    state: Tensor | None = None,
    resets: Tensor | None = None,
    solver: Solver | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Report]:
    """Return h_t = cell.step(h_{t-1}, u_t, params) for every t.

    Unconverged states are never returned: where Newton's residual exceeds the solver's tolerance,
    the tokens are walked through one by one, or an error is raised.

    Args:
        cell: what a step is, and its Jacobian.
        u: (B, T, V, D), what the inputs contribute, any float dtype.
        params: the cell's recurrent parameters, by name.
        state: (B, K, D), h before the first token; None is 0.
        resets: (B, T) bool, True where a document starts: the state before it is 0, exactly.
        solver: iterations, tolerance, and what happens when they do not meet.
        backend: "auto", "reference" (the walk, differentiated by autograd) or "eager" (Newton, its
            gradient by implicit differentiation); MEGAREC_KERNELS overrides it.

    Returns:
        The states (B, T, K, D), the last of them (B, K, D), both in promote_types(u.dtype,
        float32), in which all is computed; and what Newton did, if it was used.

    Raises:
        ValueError: An argument does not fit; the message names it.
        ArithmeticError: Not converged, and the solver says raise.
        FloatingPointError: A Jacobian that is not finite although the inputs are.
    """
    _check(cell, u, params, state, resets)
    dtype = torch.promote_types(u.dtype, torch.float32)
    u_BTVD = u.to(dtype)
    wide = {name: value.to(dtype) for name, value in params.items()}
    B, _, _, D = u.shape
    state_BKD = u_BTVD.new_zeros(B, cell.num_slots, D) if state is None else state.to(dtype)
    report = Report()
    # One token is one step, whatever solves longer sequences.
    if u.shape[1] == 1 or choose_backend("newton_rnn", backend, FORMS) == "reference":
        h_BTKD = walk(cell, u_BTVD, wide, state_BKD, resets)
    else:
        h_BTKD = newton_rnn_eager(cell, u_BTVD, wide, state_BKD, resets, solver or Solver(), report)
    # A copy, so that whoever keeps the state does not keep the whole sequence.
    return h_BTKD, h_BTKD[:, -1].clone(), report


def _check(
    cell: Cell,
    u: Tensor,
    params: Mapping[str, Tensor],
    state: Tensor | None,
    resets: Tensor | None,
) -> None:
    V = cell.num_inputs
    if u.dim() != 4 or u.shape[1] == 0 or u.shape[2] != V:
        _fail("u", f"shape {tuple(u.shape)}", f"(B, T, {V}, D) with at least one token")
    if not u.is_floating_point():
        _fail("u", str(u.dtype), "a float dtype")
    B, T, _, D = u.shape
    if params.keys() != cell.recurrent.keys():
        _fail("params", f"keys {sorted(params)}", str(sorted(cell.recurrent)))
    for name, rows in cell.recurrent.items():
        if params[name].shape != (rows, D):
            _fail(f"params[{name!r}]", f"shape {tuple(params[name].shape)}", f"{(rows, D)}")
    if state is not None and state.shape != (B, cell.num_slots, D):
        _fail("state", f"shape {tuple(state.shape)}", f"{(B, cell.num_slots, D)}")
    if resets is not None and (resets.shape != (B, T) or resets.dtype != torch.bool):
        _fail("resets", f"{resets.dtype} {tuple(resets.shape)}", f"torch.bool {(B, T)}")


def _fail(argument: str, got: str, expected: str) -> None:
    raise ValueError(f"newton_rnn: {argument}: got {got}, expected {expected}")
