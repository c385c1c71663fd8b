"""Gated linear attention in chunks of batched matmuls, with its backward written out.

Inside a chunk the recurrence is attention with decay weights; from chunk to chunk it hands on a
state (arXiv 2405.21060, 2503.14376). The backward recomputes everything of size L x L.
Suffixes as in chunks.py, and X = N * B * H, Y = N * B * G, K key dim, V value dim including, with
``normalize``, a last column of ones: what it sums up is the normaliser.
"""

from typing import Any

import torch
from torch import Tensor

from megarec_kernels.gated_linear_attention.chunks import (
    Gates,
    compute_gates,
    find_segments,
    mask_keys,
    merge_gate,
    merge_tokens,
    num_chunks,
    split_gate,
    split_tokens,
    weigh_keys_,
)
from megarec_kernels.gated_linear_attention.step import EPS, initial_state


def gated_linear_attention_eager(
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
    """Return y (B, T, H, Dv) and the final state; arguments as in gated_linear_attention."""
    B, _, H, Dv = v.shape
    dtype = torch.promote_types(v.dtype, torch.float32)
    if state is None:
        state = initial_state(
            B, H, q.shape[-1], Dv, gate=gate, normalize=normalize, dtype=dtype, device=v.device
        )
    C_BHKV = state["C"].to(dtype)
    if normalize:
        C_BHKV = torch.cat([C_BHKV, state["n"].to(dtype)[..., None]], -1)
    # A plain gate is stabilised too, from m = 0; only its state comes back in plain units.
    plain = gate == "plain"
    m_BH = C_BHKV.new_zeros(B, H) if plain else state["m"].to(dtype)
    log_f = log_f.to(dtype)
    log_i = torch.zeros_like(log_f) if log_i is None else log_i.to(dtype)
    y, C_BHKV, m_BH = _chunkwise(
        q, k, v, log_f, log_i, C_BHKV, m_BH, resets, scale, normalize, plain, chunk_size
    )
    if plain:
        C_BHKV = C_BHKV * m_BH.exp()[..., None, None]
    if normalize:
        new_state = {"C": C_BHKV[..., :Dv].contiguous(), "n": C_BHKV[..., Dv].contiguous()}
    else:
        new_state = {"C": C_BHKV}
    if not plain:
        new_state["m"] = m_BH
    return y, new_state


class _Chunkwise(torch.autograd.Function):
    """y, the final C (with n as its last column) and the final m, which carries no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_f: Tensor,
        log_i: Tensor,
        C_BHKV: Tensor,
        m_BH: Tensor,
        resets: Tensor | None,
        scale: float,
        normalize: bool,
        plain: bool,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, H, Dv = v.shape
        N, L = num_chunks(T, chunk_size)
        heads_per_group = H // q.shape[2]
        segments = find_segments(resets, N, L, v.device)
        # Tokens that fill up the last chunk have f = 1 and i = 0.
        gates, weights_NBHLL = compute_gates(
            split_gate(log_f, N, L), split_gate(log_i, N, L, fill=-torch.inf), m_BH, segments
        )
        q_YLK, k_YLK, v_XLV = _split_inputs(q, k, v, N, L, C_BHKV.dtype, normalize)
        from_start_XL1 = gates.from_start_NBHL.view(-1, L, 1)
        to_end_XL1 = gates.to_end_NBHL.view(-1, L, 1)

        k_end_XLK = _per_head(k_YLK, heads_per_group) * to_end_XL1
        states_NBHKV = C_BHKV.new_empty(N + 1, *C_BHKV.shape)
        states_NBHKV[0] = C_BHKV
        torch.bmm(k_end_XLK.mT, v_XLV, out=states_NBHKV[1:].flatten(0, 2))
        for n in range(N):
            states_NBHKV[n + 1].addcmul_(gates.decay_NBH[n, ..., None, None], states_NBHKV[n])

        scores_XLL = _per_head(q_YLK @ k_YLK.mT, heads_per_group)
        q_start_XLK = _per_head(q_YLK, heads_per_group) * from_start_XL1
        out_XLV = weights_NBHLL.flatten(0, 2).mul_(scores_XLL) @ v_XLV
        out_XLV.baddbmm_(q_start_XLK, states_NBHKV[:-1].flatten(0, 2))
        out_NBHLV = out_XLV.view(N, B, H, L, -1)

        column_NBHL = out_NBHLV[..., Dv] if normalize else None
        factor_NBHL, slope_NBHL, kept_NBHL = _output_factor(column_NBHL, gates, scale, plain)
        y_pad = v.new_empty(B, N * L, H, Dv)
        # Here and in backward not by out=: torch.compile (2.13) loses the strides of such views.
        split_tokens(y_pad, N, L).copy_(out_NBHLV[..., :Dv].mul_(factor_NBHL[..., None]))
        y = y_pad[:, :T]

        ctx.mark_non_differentiable(gates.final_m_BH)
        ctx.save_for_backward(
            q, k, v, resets, y, states_NBHKV, factor_NBHL, slope_NBHL, kept_NBHL, *gates
        )
        ctx.num_chunks = N, L
        # A copy, so that whoever keeps the final state does not keep those of all chunks.
        return y, states_NBHKV[-1].clone(), gates.final_m_BH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dC_BHKV: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, resets, y, states_NBHKV, factor_NBHL, slope_NBHL, kept_NBHL, *saved = (
            ctx.saved_tensors
        )
        gates = Gates(*saved)
        B, T, H, Dv = v.shape
        N, L = ctx.num_chunks
        G = q.shape[2]
        heads_per_group = H // G
        dtype = states_NBHKV.dtype
        normalize = slope_NBHL is not None
        segments = find_segments(resets, N, L, v.device)

        q_YLK, k_YLK, v_XLV = _split_inputs(q, k, v, N, L, dtype, normalize)
        from_start_XL1 = gates.from_start_NBHL.view(-1, L, 1)
        to_end_XL1 = gates.to_end_NBHL.view(-1, L, 1)

        dout_XLV = torch.empty_like(v_XLV)
        dout_NBHLV = dout_XLV.view(N, B, H, L, -1)
        dout_NBHLV[..., :Dv].copy_(split_tokens(dy, N, L)).mul_(factor_NBHL[..., None])
        dquery_NBHL = split_gate((y.to(dtype) * dy).sum(-1), N, L)
        if normalize:
            dout_NBHLV[..., Dv] = dquery_NBHL * slope_NBHL
            dquery_NBHL = dquery_NBHL * kept_NBHL

        q_start_XLK = _per_head(q_YLK, heads_per_group) * from_start_XL1
        dstates_NBHKV = torch.empty_like(states_NBHKV)
        torch.bmm(q_start_XLK.mT, dout_XLV, out=dstates_NBHKV[:-1].flatten(0, 2))
        dstates_NBHKV[-1] = dC_BHKV
        for n in reversed(range(N)):
            dstates_NBHKV[n].addcmul_(gates.decay_NBH[n, ..., None, None], dstates_NBHKV[n + 1])
        states_in_XKV = states_NBHKV[:-1].flatten(0, 2)
        dstates_out_XKV = dstates_NBHKV[1:].flatten(0, 2)

        weights_NBHLL = weigh_keys_(mask_keys(gates.key_NBHL, segments), gates.query_NBHL)
        weights_XLL = weights_NBHLL.flatten(0, 2)
        p_XLL = _per_head(q_YLK @ k_YLK.mT, heads_per_group).mul_(weights_XLL)
        k_end_XLK = _per_head(k_YLK, heads_per_group) * to_end_XL1
        dv_XLV = (p_XLL.mT @ dout_XLV).baddbmm_(k_end_XLK, dstates_out_XKV)
        dscores_YLL = _per_group((dout_XLV @ v_XLV.mT).mul_(weights_XLL), heads_per_group)
        dq_YLK = _per_group((dout_XLV @ states_in_XKV.mT).mul_(from_start_XL1), heads_per_group)
        dq_YLK.baddbmm_(dscores_YLL, k_YLK)
        dk_YLK = _per_group((v_XLV @ dstates_out_XKV.mT).mul_(to_end_XL1), heads_per_group)
        dk_YLK.baddbmm_(dscores_YLL.mT, q_YLK)

        # Weights are exp(query - key). d log_i is what a key gets; d log_f is what decays across
        # the token get: in the chunk, queries minus keys from here on; beyond it, the share of the
        # outgoing state. Sums stay in a chunk and document: nothing cancels over long distances.
        # (Products overwrite a factor that has served: fresh memory costs more than arithmetic.)
        dlog_i_NBHL = v_XLV.mul_(dv_XLV).sum(-1).view(N, B, H, L)
        dlog_f_NBHL = (dquery_NBHL - dlog_i_NBHL) @ segments.same_NBLL.to(dtype)
        beyond_NBH = dstates_NBHKV[1:].mul_(states_NBHKV[1:]).sum((-2, -1))
        dlog_f_NBHL += beyond_NBH[..., None] * segments.last_NB1L
        dlog_f = merge_gate(dlog_f_NBHL, T)
        if resets is not None:
            dlog_f = dlog_f.masked_fill(resets[..., None], 0.0)
        return (
            merge_tokens(dq_YLK.view(N, B, G, L, -1).to(q.dtype), T),
            merge_tokens(dk_YLK.view(N, B, G, L, -1).to(k.dtype), T),
            merge_tokens(dv_XLV.view(N, B, H, L, -1)[..., :Dv].to(v.dtype), T),
            dlog_f,
            merge_gate(dlog_i_NBHL, T),
            dstates_NBHKV[0],
            *[None] * 6,
        )


@torch.compiler.allow_in_graph
def _chunkwise(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Apply it; torch.compile takes it as a whole and traces both of its passes."""
    result: tuple[Tensor, Tensor, Tensor] = _Chunkwise.apply(*args)
    return result


def _output_factor(
    column_NBHL: Tensor | None, gates: Gates, scale: float, plain: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return factor, slope and kept (N, B, H, L), where y = factor * out.

    ``column_NBHL`` is out's last column if it is to normalise. Then factor depends on it:
    d log(factor) / d column = slope; kept = 1 + slope * column is the share of a change of a
    query's weights, which scale out and column alike, that reaches y.
    """
    if column_NBHL is None:
        return scale * gates.exp_m_NBHL, None, None
    one_NBHL = 1 / gates.exp_m_NBHL
    norm_NBHL = (scale * column_NBHL).abs()
    eps = EPS * one_NBHL if plain else EPS
    factor_NBHL = scale / (torch.maximum(norm_NBHL, one_NBHL) + eps)
    slope_NBHL = -factor_NBHL * (scale * column_NBHL).sign() * (norm_NBHL > one_NBHL)
    return factor_NBHL, slope_NBHL, 1 + slope_NBHL * column_NBHL


def _split_inputs(
    q: Tensor, k: Tensor, v: Tensor, N: int, L: int, dtype: torch.dtype, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q and k (Y, L, K) and v (X, L, V), contiguous."""
    q_NBGLK = split_tokens(q, N, L).to(dtype, copy=True, memory_format=torch.contiguous_format)
    k_NBGLK = split_tokens(k, N, L).to(dtype, copy=True, memory_format=torch.contiguous_format)
    v_NBHLV = split_tokens(v, N, L)
    Dv = v.shape[-1]
    buffer_NBHLV = v.new_empty(*v_NBHLV.shape[:-1], Dv + normalize, dtype=dtype)
    buffer_NBHLV[..., :Dv] = v_NBHLV
    buffer_NBHLV[..., Dv:] = 1
    return q_NBGLK.flatten(0, 2), k_NBGLK.flatten(0, 2), buffer_NBHLV.flatten(0, 2)


def _per_head(x_Y: Tensor, heads_per_group: int) -> Tensor:
    """Repeat each group's matrix for its heads: (Y, ...) to (X, ...)."""
    return x_Y if heads_per_group == 1 else x_Y.repeat_interleave(heads_per_group, 0)


def _per_group(x_X: Tensor, heads_per_group: int) -> Tensor:
    """Add up the heads of each group: (X, ...) to (Y, ...)."""
    return x_X if heads_per_group == 1 else x_X.view(-1, heads_per_group, *x_X.shape[1:]).sum(1)
