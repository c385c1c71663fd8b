"""A nonlinear recurrence as a walk over the tokens: slow, exact, differentiated by autograd."""

import torch
from torch import Tensor

from megarec_kernels.newton_rnn.cell import Cell, Params


def walk(
    cell: Cell, u_BTVD: Tensor, params: Params, state_BKD: Tensor, resets_BT: Tensor | None
) -> Tensor:
    """Return the states (B, T, K, D) of every token."""
    states_BKD = []
    # Unbound at once: the gradient of each u[:, t] would be a whole u of zeros.
    for t, u_BVD in enumerate(u_BTVD.unbind(1)):
        if resets_BT is not None:
            state_BKD = state_BKD.masked_fill(resets_BT[:, t, None, None], 0)
        state_BKD = cell.step(state_BKD, u_BVD, params)
        states_BKD.append(state_BKD)
    return torch.stack(states_BKD, 1)
