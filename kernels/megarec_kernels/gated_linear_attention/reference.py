"""Gated linear attention as a loop over tokens: slow, obvious, differentiated by autograd."""

import torch
from torch import Tensor

from megarec_kernels.gated_linear_attention.step import initial_state, step


def gated_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    log_i: Tensor | None,
    *,
    resets: Tensor | None,
    state: dict[str, Tensor] | None,
    scale: float,
    gate: str,
    normalize: bool,
    chunk_size: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return y (B, T, H, Dv) and the final state; arguments as in gated_linear_attention.

    ``chunk_size`` has no effect: every token is one step.
    """
    B, T, H, Dv = v.shape
    dtype = torch.promote_types(v.dtype, torch.float32)
    zero_state = initial_state(
        B, H, q.shape[-1], Dv, gate=gate, normalize=normalize, dtype=dtype, device=v.device
    )
    state = zero_state if state is None else state
    ys_BHV = []
    for t in range(T):
        if resets is not None:
            state = {key: _where(resets[:, t], zero_state[key], state[key]) for key in state}
        log_i_BH = None if log_i is None else log_i[:, t]
        y_BHV, state = step(q[:, t], k[:, t], v[:, t], log_f[:, t], log_i_BH, state, scale)
        ys_BHV.append(y_BHV)
    return torch.stack(ys_BHV, 1), state


def _where(condition_B: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Select whole rows of the batch."""
    return torch.where(condition_B.view(-1, *[1] * (x.dim() - 1)), x, y)
