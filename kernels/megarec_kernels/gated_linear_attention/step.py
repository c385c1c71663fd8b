"""One token of gated linear attention: the recurrence itself, used for decoding."""

import torch
from torch import Tensor

from megarec_kernels.gated_linear_attention.checks import check_tokens

EPS = 1e-6
"""Added to the normaliser."""


def initial_state(
    batch_size: int,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    *,
    gate: str,
    normalize: bool,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Return the zero state, with the keys that ``gate`` and ``normalize`` ask for.

    C (B, H, Dk, Dv), n (B, H, Dk) if ``normalize``, m (B, H) if gate is "exp". m is 0, not -inf.
    """
    shapes: dict[str, tuple[int, ...]] = {"C": (batch_size, num_heads, key_dim, value_dim)}
    if normalize:
        shapes["n"] = (batch_size, num_heads, key_dim)
    if gate == "exp":
        shapes["m"] = (batch_size, num_heads)
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}


def gated_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    log_i: Tensor | None = None,
    *,
    state: dict[str, Tensor],
    scale: float | None = None,
    gate: str = "exp",
    normalize: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Process one token; arguments as in gated_linear_attention, without the time dimension.

    q and k are (B, G, Dk), v is (B, H, Dv), log_f and log_i are (B, H). Returns y (B, H, Dv) in
    v's dtype and the new state; ``state`` itself is left as it was.

    Raises ValueError, naming the argument, where one does not fit.
    """
    check_tokens(q, k, v, log_f, log_i, state, gate, normalize)
    return step(q, k, v, log_f, log_i, state, q.shape[-1] ** -0.5 if scale is None else scale)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    log_i: Tensor | None,
    state: dict[str, Tensor],
    scale: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Process one token whose arguments were checked; the state's keys say gate and normalize.

    In stabilised units (arXiv 2405.04517): m' = max(log f + m, log i), f' = exp(log f + m - m'),
    i' = exp(log i - m'). The gate "plain" is the same with m = 0 throughout.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    heads_per_group = v.shape[1] // q.shape[1]
    q_BHK = (q.to(dtype) * scale).repeat_interleave(heads_per_group, 1)
    k_BHK = k.to(dtype).repeat_interleave(heads_per_group, 1)
    f_BH = log_f.to(dtype)
    i_BH = torch.zeros_like(f_BH) if log_i is None else log_i.to(dtype)
    if "m" in state:
        m_old_BH = state["m"].to(dtype).detach()
        m_BH = torch.maximum(f_BH + m_old_BH, i_BH).detach()
        f_BH, i_BH = f_BH + m_old_BH - m_BH, i_BH - m_BH
        one_BH = torch.exp(-m_BH)  # 1 in units of exp(m)
    else:
        one_BH = torch.ones_like(f_BH)

    f_BH1, ik_BHK = f_BH.exp()[..., None], i_BH.exp()[..., None] * k_BHK
    C_BHKV = f_BH1[..., None] * state["C"].to(dtype) + ik_BHK[..., None] * v.to(dtype)[:, :, None]
    y_BHV = torch.einsum("bhk,bhkv->bhv", q_BHK, C_BHKV)
    new_state = {"C": C_BHKV}
    if "n" in state:
        n_BHK = f_BH1 * state["n"].to(dtype) + ik_BHK
        norm_BH = (q_BHK * n_BHK).sum(-1).abs()
        y_BHV = y_BHV / (torch.maximum(norm_BH, one_BH) + EPS)[..., None]
        new_state["n"] = n_BHK
    else:
        y_BHV = y_BHV / one_BH[..., None]
    if "m" in state:
        new_state["m"] = m_BH
    return y_BHV.to(v.dtype), new_state
