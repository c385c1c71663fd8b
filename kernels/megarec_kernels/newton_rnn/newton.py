"""Newton's method over a whole sequence, and the gradient at its solution.

The states of all tokens are one unknown, h_t = step(h_{t-1}, u_t) its equations. An iteration
evaluates step and its Jacobian J everywhere at once and solves the linear recurrence
d_t = J_t d_{t-1} + (step(h_{t-1}, u_t) - h_t) for the correction (arXiv 2510.21450, eqs. 2.2-2.4).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from megarec_kernels.affine_scan.eager import adjoint, scan
from megarec_kernels.newton_rnn.cell import Cell
from megarec_kernels.newton_rnn.sequential import walk


@dataclass(frozen=True)
class Solver:
    """How the equations are solved.

    Attributes:
        iterations: of Newton's method, at most.
        tolerance: largest residual |h_t - step(h_{t-1}, u_t)| at which states count as solved; inf
            takes any that are finite.
        early_stop: stop as soon as the tolerance is met; on a GPU each look costs a wait.
        on_failure: where the tolerance is not met after the last iteration, walk through the
            tokens one by one, which is exact, or raise.
    """

    iterations: int = 3
    tolerance: float = 1e-3
    early_stop: bool = False
    on_failure: Literal["sequential", "raise"] = "sequential"

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"newton_rnn: iterations: got {self.iterations}, expected at least 1")
        if not self.tolerance > 0:
            raise ValueError(f"newton_rnn: tolerance: got {self.tolerance}, expected more than 0")
        if self.on_failure not in ("sequential", "raise"):
            raise ValueError(
                f"newton_rnn: on_failure: got {self.on_failure!r}, expected 'sequential' or 'raise'"
            )


@dataclass
class Report:
    """What a solve did.

    Attributes:
        residuals: largest residual of the initial guess and after each iteration, inf where a
            state is not finite; empty if the tokens were walked through from the start.
        fell_back: the tolerance was not met, and the states are those of the sequential walk.
    """

    residuals: list[float] = field(default_factory=list)
    fell_back: bool = False

    @property
    def iterations(self) -> int:
        """The iterations made."""
        return max(0, len(self.residuals) - 1)


@torch.compiler.disable(
    reason="Newton's method looks at its residuals, and what it does hangs on them"
)
def newton_rnn_eager(
    cell: Cell,
    u_BTVD: Tensor,
    params: dict[str, Tensor],
    state_BKD: Tensor,
    resets_BT: Tensor | None,
    solver: Solver,
    report: Report,
) -> Tensor:
    """Return the states (B, T, K, D), and fill in the report."""
    return _newton(
        cell, solver, report, tuple(params), resets_BT, state_BKD, u_BTVD, *params.values()
    )


class _Newton(torch.autograd.Function):
    """The solution; its gradient by implicit differentiation, whatever iterations led there.

    With l_t = g_t + J_{t+1}^T l_{t+1}, one reverse recurrence, the gradients of inputs and
    parameters are those of a single step with cotangent l_t (arXiv 2510.21450, eq. 2.6).
    """

    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        solver: Solver,
        report: Report,
        names: tuple[str, ...],
        resets_BT: Tensor | None,
        state_BKD: Tensor,
        u_BTVD: Tensor,
        *values: Tensor,
    ) -> Tensor:
        params = dict(zip(names, values, strict=True))
        h_BTKD = _solve(cell, solver, report, u_BTVD, params, state_BKD, resets_BT)
        ctx.cell, ctx.names = cell, names
        ctx.save_for_backward(resets_BT, state_BKD, u_BTVD, h_BTKD, *values)
        return h_BTKD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh_BTKD: Tensor) -> tuple[Tensor | None, ...]:
        resets_BT, state_BKD, u_BTVD, h_BTKD, *values = ctx.saved_tensors
        before_BTKD = _before(h_BTKD, state_BKD, resets_BT)
        params = dict(zip(ctx.names, values, strict=True))
        _, A = ctx.cell.jacobian(before_BTKD, u_BTVD, params)
        A = _keep(A, resets_BT)
        cotangent_BTKD, dstate_BKD = adjoint(A, dh_BTKD)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (u_BTVD, *values)]
            new_BTKD = ctx.cell.step(
                before_BTKD, leaves[0], dict(zip(ctx.names, leaves[1:], strict=True))
            )
        du_BTVD, *dvalues = torch.autograd.grad(
            new_BTKD, leaves, cotangent_BTKD, allow_unused=True, materialize_grads=True
        )
        return None, None, None, None, None, dstate_BKD, du_BTVD, *dvalues


_newton: Callable[..., Tensor] = _Newton.apply


def _solve(
    cell: Cell,
    solver: Solver,
    report: Report,
    u_BTVD: Tensor,
    params: dict[str, Tensor],
    state_BKD: Tensor,
    resets_BT: Tensor | None,
) -> Tensor:
    zeros_BTKD = state_BKD.new_zeros(*u_BTVD.shape[:2], *state_BKD.shape[1:])
    h_BTKD = guess_BTKD = cell.step(zeros_BTKD, u_BTVD, params)
    residuals: list[Tensor] = []
    for _ in range(solver.iterations):
        new_BTKD, A = cell.jacobian(_before(h_BTKD, state_BKD, resets_BT), u_BTVD, params)
        residual_BTKD = new_BTKD - h_BTKD
        residuals.append(residual_BTKD.abs().amax())
        if solver.early_stop and residuals[-1] <= solver.tolerance:
            break
        # The unknown state before the first token is known: its correction is 0.
        h_BTKD = h_BTKD + scan(_keep(A, resets_BT), residual_BTKD, torch.zeros_like(state_BKD))
    else:
        new_BTKD = cell.step(_before(h_BTKD, state_BKD, resets_BT), u_BTVD, params)
        residuals.append((new_BTKD - h_BTKD).abs().amax())
    inf = torch.inf
    report.residuals = torch.stack(residuals).nan_to_num(nan=inf, posinf=inf).tolist()
    if report.residuals[-1] <= solver.tolerance and report.residuals[-1] < inf:
        return h_BTKD
    report.fell_back = True
    if all(x.isfinite().all() for x in (u_BTVD, state_BKD, *params.values())):
        _, A = cell.jacobian(_before(guess_BTKD, state_BKD, resets_BT), u_BTVD, params)
        _explain_failure(cell, solver, report, bool(A.isfinite().all()))
    # Where what comes in is not finite, so is what goes out, and the trainer will see it.
    return walk(cell, u_BTVD, params, state_BKD, resets_BT)


def _explain_failure(cell: Cell, solver: Solver, report: Report, is_finite: bool) -> None:
    """Raise unless walking through the tokens is what the solver asks for."""
    name = type(cell).__name__
    if not is_finite:
        raise FloatingPointError(
            f"newton_rnn: {name}: step or its Jacobian is not finite at the initial guess, "
            "although inputs and parameters are"
        )
    if solver.on_failure == "raise":
        raise ArithmeticError(
            f"newton_rnn: {name}: residual {report.residuals[-1]:.2g} after {report.iterations} "
            f"iterations, expected at most {solver.tolerance:.2g}; clip the recurrent weights, "
            "iterate more, or fall back to the sequential walk"
        )


def _before(h_BTKD: Tensor, state_BKD: Tensor, resets_BT: Tensor | None) -> Tensor:
    """Return the state before each token, 0 where a document starts."""
    before_BTKD = torch.cat([state_BKD[:, None], h_BTKD[:, :-1]], 1)
    return _keep(before_BTKD, resets_BT)


def _keep(x: Tensor, resets_BT: Tensor | None) -> Tensor:
    """Return x (B, T, ...), 0 where a document starts."""
    if resets_BT is None:
        return x
    return x.masked_fill(resets_BT.view(*resets_BT.shape, *[1] * (x.dim() - 2)), 0)
