"""Layout and gates of the chunkwise form: which token weighs how much inside which chunk.

Suffixes: N chunks of L tokens, B batch, H heads, D dims of a head; T tokens of the sequence.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Weights are powers of 2, not of e: on CPU torch.exp2 is several times faster than torch.exp, and
# does not slow down where decays underflow.
LOG2_E = math.log2(math.e)


class Segments(NamedTuple):
    """How documents lie in the chunks; N and B are 1 when there are no resets."""

    same_NBLL: Tensor
    """bool: query (row) and key (column) share a document, and the key is not in the future."""
    first_NB1L: Tensor
    """bool: no reset in the chunk up to this token, so that it sees the incoming state."""
    last_NB1L: Tensor
    """bool: no reset in the chunk after this token, so that the outgoing state sees it."""


class Gates(NamedTuple):
    """The gates of a sequence in chunks. m is the running maximum that keeps weights below 1."""

    key_NBHL: Tensor
    """log2 of a key's weight inside the chunk, up to a factor that the query sets."""
    query_NBHL: Tensor
    """log2 of that factor's inverse."""
    from_start_NBHL: Tensor
    """Weight of the chunk's incoming state for a query."""
    to_end_NBHL: Tensor
    """Weight of a key in the chunk's outgoing state."""
    decay_NBH: Tensor
    """Weight of the chunk's incoming state in its outgoing state."""
    exp_m_NBHL: Tensor
    """exp(m), the unit of the sums at a query."""
    final_m_BH: Tensor
    """m after the last token, the unit of the final state."""


def num_chunks(num_tokens: int, chunk_size: int) -> tuple[int, int]:
    """Return (N, L): as few chunks as chunk_size allows, cut as evenly as possible."""
    count = math.ceil(num_tokens / chunk_size)
    return count, math.ceil(num_tokens / count)


def split_tokens(x_BTHD: Tensor, N: int, L: int) -> Tensor:
    """Return (N, B, H, L, D), a view unless zeros must fill up the last chunk."""
    B, T, H, D = x_BTHD.shape
    if T < N * L:
        x_BTHD = F.pad(x_BTHD, (0, 0, 0, 0, 0, N * L - T))
    return x_BTHD.view(B, N, L, H, D).permute(1, 0, 3, 2, 4)


def merge_tokens(x_NBHLD: Tensor, T: int) -> Tensor:
    """Undo split_tokens: return (B, T, H, D)."""
    return x_NBHLD.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]


def split_gate(x_BTH: Tensor, N: int, L: int, fill: float = 0.0) -> Tensor:
    """Return (N, B, H, L), contiguous; ``fill`` fills up the last chunk."""
    B, T, H = x_BTH.shape
    x_BTH = F.pad(x_BTH, (0, 0, 0, N * L - T), value=fill)
    return x_BTH.view(B, N, L, H).permute(1, 0, 3, 2).contiguous()


def merge_gate(x_NBHL: Tensor, T: int) -> Tensor:
    """Undo split_gate: return (B, T, H)."""
    return x_NBHL.permute(1, 0, 3, 2).flatten(1, 2)[:, :T]


def find_segments(resets_BT: Tensor | None, N: int, L: int, device: torch.device) -> Segments:
    """Return the masks of every chunk."""
    if resets_BT is None:
        document_NBL = torch.zeros(1, 1, L, dtype=torch.int64, device=device)
    else:
        B, T = resets_BT.shape
        resets_BNL = F.pad(resets_BT, (0, N * L - T)).view(B, N, L)
        document_NBL = resets_BNL.transpose(0, 1).cumsum(-1)
    return Segments(
        same_NBLL=(document_NBL[..., :, None] == document_NBL[..., None, :]).tril(),
        first_NB1L=(document_NBL == 0)[:, :, None],
        last_NB1L=(document_NBL == document_NBL[..., -1:])[:, :, None],
    )


def compute_gates(
    log_f_NBHL: Tensor, log_i_NBHL: Tensor, m_BH: Tensor, segments: Segments
) -> tuple[Gates, Tensor]:
    """Return the gates and the weights (N, B, H, L, L) of keys for queries inside a chunk.

    ``m_BH`` is the unit of the initial state. Sums of log_f are masked matmuls over one document:
    a difference of running sums would carry the rounding of one document into the next.
    """
    same_NBLL = segments.same_NBLL.to(log_f_NBHL.dtype)
    # Decay from the start of the chunk or document up to a token, and from a token to the end.
    # The second is a sum of its own, because total minus running sum would cancel.
    start_NBHL = log_f_NBHL @ same_NBLL.mT
    end_NBHL = (log_f_NBHL @ same_NBLL.tril(-1) + log_i_NBHL).masked_fill(
        ~segments.last_NB1L, -torch.inf
    )

    # m at the chunks' ends: m' = max(decay + m, newest keys). After a reset m starts from 0.
    unbroken_NB1 = segments.first_NB1L[..., -1]
    decay_NBH, newest_NBH = start_NBHL[..., -1], end_NBHL.amax(-1)
    newest_NBH = torch.where(unbroken_NB1, newest_NBH, torch.maximum(newest_NBH, decay_NBH))
    decay_NBH = decay_NBH.masked_fill(~unbroken_NB1, -torch.inf)
    ms_BH = [m_BH]
    for decay_BH, newest_BH in zip(decay_NBH, newest_NBH, strict=True):
        ms_BH.append(torch.maximum(ms_BH[-1] + decay_BH, newest_BH))
    m_NBH = torch.stack(ms_BH)

    key_NBHL = (log_i_NBHL - start_NBHL) * LOG2_E
    keys_NBHLL = mask_keys(key_NBHL, segments)
    m_in_NBHL = torch.where(segments.first_NB1L, m_NBH[:-1, ..., None], 0.0) * LOG2_E
    query_NBHL = torch.maximum(m_in_NBHL, keys_NBHLL.amax(-1))
    gates = Gates(
        key_NBHL=key_NBHL,
        query_NBHL=query_NBHL,
        from_start_NBHL=torch.exp2(m_in_NBHL - query_NBHL) * segments.first_NB1L,
        to_end_NBHL=torch.exp2((end_NBHL - m_NBH[1:, ..., None]) * LOG2_E),
        decay_NBH=torch.exp2((decay_NBH + m_NBH[:-1] - m_NBH[1:]) * LOG2_E),
        exp_m_NBHL=torch.exp2(start_NBHL * LOG2_E + query_NBHL),
        final_m_BH=ms_BH[-1],
    )
    return gates, weigh_keys_(keys_NBHLL, query_NBHL)


def mask_keys(key_NBHL: Tensor, segments: Segments) -> Tensor:
    """Return (N, B, H, L, L): log2 of the keys' weights, -inf where a query must not look."""
    bias_NBLL = torch.zeros_like(segments.same_NBLL, dtype=key_NBHL.dtype)
    bias_NBLL.masked_fill_(~segments.same_NBLL, -torch.inf)
    return key_NBHL[..., None, :] + bias_NBLL[:, :, None]


def weigh_keys_(keys_NBHLL: Tensor, query_NBHL: Tensor) -> Tensor:
    """Turn the result of mask_keys into weights, in place."""
    return keys_NBHLL.sub_(query_NBHL[..., None]).exp2_()
