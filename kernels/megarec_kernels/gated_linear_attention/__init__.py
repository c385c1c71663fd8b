"""Gated linear attention: S_t = f_t S_{t-1} + i_t k_t v_t^T with scalar gates a head and token."""

from typing import Literal

import torch
from torch import Tensor

from megarec_kernels.dispatch import choose_backend
from megarec_kernels.gated_linear_attention.checks import check_inputs
from megarec_kernels.gated_linear_attention.eager import gated_linear_attention_eager
from megarec_kernels.gated_linear_attention.gpu import gated_linear_attention_gpu, gpu_problem
from megarec_kernels.gated_linear_attention.reference import gated_linear_attention_reference
from megarec_kernels.gated_linear_attention.step import (
    gated_linear_attention_step,
    initial_state,
)

__all__ = ["gated_linear_attention", "gated_linear_attention_step", "initial_state"]

FORMS = {
    "reference": gated_linear_attention_reference,
    "eager": gated_linear_attention_eager,
    "gpu": gated_linear_attention_gpu,
}


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    log_i: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    state: dict[str, Tensor] | None = None,
    scale: float | None = None,
    gate: Literal["exp", "plain"] = "exp",
    normalize: bool = False,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Run the recurrence over a sequence.

    S_t = f_t S_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t and y_t = scale * q_t S_t, which
    ``normalize`` divides by max(|scale * q_t n_t|, 1). This is the mLSTM (arXiv 2405.04517: gate
    "exp", normalize), Mamba-2 (arXiv 2405.21060: gate "plain", f = exp(dt A), i = dt, grouped q
    and k), retention (i = 1) and more.

    Args:
        q: Queries, (B, T, G, Dk), any float dtype.
        k: Keys, like q. G divides H: each q and k head serves H / G consecutive value heads.
        v: Values, (B, T, H, Dv), dtype of q.
        log_f: Log of the forget gate, (B, T, H), finite.
        log_i: Log of the input gate, (B, T, H); None means i = 1.
        resets: (B, T) bool. True at t sets the state before t to the zero state, exactly: no token
            before t touches a bit of what follows. resets[:, 0] False continues ``state``.
        state: State before the first token, see below; None means zero (C = n = m = 0).
        scale: Factor on q; None means Dk ** -0.5.
        gate: "exp" keeps a running maximum m of the gates, so that exponential gates cannot
            overflow; no gradient flows through m. "plain" returns an unscaled state, and no m.
        normalize: Divide by the normaliser, in units of exp(m) and with 1e-6 added. Without it
            y is the plain sum, which overflows where gates add up beyond the dtype's range.
        chunk_size: Tokens a chunk, at most; the result depends on it by rounding alone.
        backend: "auto", "reference", "eager" or "gpu" (Triton kernels, which "auto" takes on a GPU
            where they fit); MEGAREC_KERNELS overrides it.

    Returns:
        y (B, T, H, Dv) in v's dtype.
        The state after the last token: C (B, H, Dk, Dv); n (B, H, Dk) if ``normalize``;
        m (B, H) if gate is "exp", where C and n are in units of exp(m).
        log_decay (B, H), by which the incoming state decayed in all: the sum of log_f, or -inf
        where there was a reset.
        State and log_decay have dtype promote_types(v.dtype, float32), in which all is computed.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    check_inputs(q, k, v, log_f, log_i, resets, state, gate, normalize, chunk_size)
    problem = gpu_problem(q, v)
    fastest = "gpu" if v.is_cuda and problem is None else "eager"
    form = choose_backend("gated_linear_attention", backend, FORMS, fastest, problem)
    y, state = FORMS[form](
        q,
        k,
        v,
        log_f,
        log_i,
        resets=resets,
        state=state,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        gate=gate,
        normalize=normalize,
        chunk_size=chunk_size,
    )
    log_decay = log_f.sum(1, dtype=torch.promote_types(v.dtype, torch.float32))
    if resets is not None:
        log_decay = log_decay.masked_fill(resets.any(1, keepdim=True), -torch.inf)
    return y, state, log_decay
