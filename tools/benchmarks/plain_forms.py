"""Gated linear attention as one would write it at first: quadratic, and in chunks by autograd.

Both compute what `gated_linear_attention` does with zero initial state and no documents. Shapes:
B batch, T time, H heads, K and V head dims, N chunks of L tokens.
"""

import torch
from torch import Tensor

EPS = 1e-6


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, log_i: Tensor, *, normalize: bool
) -> Tensor:
    """Return y (B, T, H, V) from all T x T weights at once."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    decay_BHT, log_i = log_f.cumsum(1).transpose(1, 2), log_i.transpose(1, 2)
    log_weights = _log_weights(decay_BHT, log_i)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if not normalize:
        return (scores * log_weights.exp() @ v).transpose(1, 2)
    m_BHT = torch.maximum(decay_BHT, log_weights.amax(-1)).detach()
    weights = scores * (log_weights - m_BHT[..., None]).exp()
    norm_BHT = torch.maximum(weights.sum(-1).abs(), (-m_BHT).exp()) + EPS
    return (weights @ v / norm_BHT[..., None]).transpose(1, 2)


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    log_i: Tensor,
    *,
    normalize: bool,
    chunk_size: int,
) -> Tensor:
    """Return y (B, T, H, V); quadratic in a chunk, and a loop over chunks hands the state on."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, chunk_size)).transpose(2, 3)  # (B, N, H, L, ...)

    q, k, v, log_f, log_i = (split(x) for x in (q * q.shape[-1] ** -0.5, k, v, log_f, log_i))
    if normalize:
        # What the last column sums up is the normaliser.
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    decay = log_f.cumsum(-1)
    log_weights = _log_weights(decay, log_i)
    to_end = decay[..., -1:] - decay + log_i
    scores = q @ k.mT
    B, N, H, _, K = q.shape
    S_BHKV = v.new_zeros(B, H, K, v.shape[-1])
    m_BH = v.new_zeros(B, H)
    ys = []
    for n in range(N):
        # In units of exp(m), so that nothing overflows.
        inner = torch.maximum(decay[:, n] + m_BH[..., None], log_weights[:, n].amax(-1)).detach()
        weights = (log_weights[:, n] - inner[..., None]).exp() * scores[:, n]
        from_start = (decay[:, n] + m_BH[..., None] - inner).exp()
        y = weights @ v[:, n] + (q[:, n] * from_start[..., None]) @ S_BHKV
        if normalize:
            y, norm = y[..., :-1], y[..., -1:]
            y = y / (torch.maximum(norm.abs(), (-inner).exp()[..., None]) + EPS)
        else:
            y = y * inner.exp()[..., None]
        ys.append(y)
        total = decay[:, n, :, -1]
        new_m_BH = torch.maximum(total + m_BH, to_end[:, n].amax(-1)).detach()
        keys = k[:, n] * (to_end[:, n] - new_m_BH[..., None]).exp()[..., None]
        S_BHKV = (total + m_BH - new_m_BH).exp()[..., None, None] * S_BHKV + keys.mT @ v[:, n]
        m_BH = new_m_BH
    return torch.stack(ys, 1).transpose(2, 3).flatten(1, 2)


def _log_weights(decay: Tensor, log_i: Tensor) -> Tensor:
    """Return the log of each key's weight for each query (..., T, T), -inf for the future."""
    past = torch.ones(decay.shape[-1], decay.shape[-1], dtype=torch.bool, device=decay.device)
    log_weights = decay[..., :, None] - decay[..., None, :] + log_i[..., None, :]
    return log_weights.masked_fill(~past.tril(), -torch.inf)
