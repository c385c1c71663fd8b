"""Gated linear attention on a GPU: Triton kernels behind two torch ops, forward and backward.

Per token only scalars are prepared; a kernel walks the sequence and keeps the state before each
chunk, and from there tiles of y are summed up in parallel (arXiv 2405.21060, 2503.14376). Nothing
of size L x L is stored, and the backward recomputes the states. The ops make it one node for
torch.compile and activation checkpointing.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from megarec_kernels.dispatch import triton_problem
from megarec_kernels.gated_linear_attention.chunks import num_chunks
from megarec_kernels.gated_linear_attention.step import initial_state

MAX_DIM = 512
"""Largest head dim of keys and values."""
TILE = 64
"""Tokens of a tile, at most; at least 16, what a matrix product takes."""


def gpu_problem(q: Tensor, v: Tensor) -> str | None:
    """Return why the kernels cannot take these inputs, or None where they can."""
    if v.dtype == torch.float64:
        return "the kernels compute in float32 and refuse float64; use 'eager'"
    largest = max(q.shape[-1], v.shape[-1])
    if largest > MAX_DIM:
        return f"the kernels take head dims up to {MAX_DIM}, got {largest}; use 'eager'"
    return triton_problem(v)


def gated_linear_attention_gpu(
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
    states_dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return y (B, T, H, Dv) and the final state; arguments as in gated_linear_attention.

    A chunk is a whole number of tiles of 16, 32 or 64 tokens, so 16 tokens at least.
    ``states_dtype`` is the dtype of the states between chunks in memory, and only there: None
    means bfloat16 for bfloat16 inputs and else float32, as float16 would overflow.
    """
    B, _, H, Dv = v.shape
    if state is None:
        state = initial_state(
            B, H, q.shape[-1], Dv, gate=gate, normalize=normalize, device=v.device
        )
    plain = gate == "plain"
    C_BHKV = state["C"].float()
    # A plain gate is stabilised too, from m = 0; only its state comes back in plain units.
    m_BH = C_BHKV.new_zeros(B, H) if plain else state["m"].detach().float()
    n_BHK = state["n"].float() if normalize else C_BHKV.new_zeros(0)
    if states_dtype is None:
        states_dtype = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    y, C_BHKV, n_BHK, m_BHN, _ = _forward(
        q, k, v, log_f.float(), None if log_i is None else log_i.float(), C_BHKV, n_BHK, m_BH,
        resets, scale, normalize, plain, chunk_size, states_dtype,
    )  # fmt: skip
    m_BH = m_BHN[..., -1].detach()
    if plain:
        unit_BH = m_BH.exp()
        C_BHKV, n_BHK = C_BHKV * unit_BH[..., None, None], n_BHK * unit_BH[..., None]
    new_state = {"C": C_BHKV}
    if normalize:
        new_state["n"] = n_BHK
    if not plain:
        new_state["m"] = m_BH
    return y, new_state


class Plan(NamedTuple):
    """How a sequence is cut, and what every kernel needs to know of it."""

    B: int
    T: int
    G: int
    H: int
    K: int
    V: int
    tile: int
    tiles: int
    """Tiles of a chunk."""
    num_tiles: int
    num_chunks: int

    @property
    def padded(self) -> int:
        """Tokens of all tiles."""
        return self.num_tiles * self.tile

    @property
    def heads_per_group(self) -> int:
        """Value heads that share a head of queries and keys."""
        return self.H // self.G


def make_plan(q: Tensor, v: Tensor, chunk_size: int) -> Plan:
    """Cut the sequence into chunks of at most `chunk_size` tokens, in tiles of a power of 2."""
    B, T, G, K = q.shape
    H, V = v.shape[2:]
    tile = max(16, min(TILE, 1 << (chunk_size.bit_length() - 1), 1 << (T - 1).bit_length()))
    num_tiles = -(-T // tile)
    count, tiles = num_chunks(num_tiles, max(1, chunk_size // tile))
    return Plan(B, T, G, H, K, V, tile, tiles, num_tiles, -(-num_tiles // tiles))


@custom_op("megarec::gated_linear_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    log_i: Tensor | None,
    C_BHKV: Tensor,
    n_BHK: Tensor,
    m_BH: Tensor,
    resets: Tensor | None,
    scale: float,
    normalize: bool,
    plain: bool,
    chunk_size: int,
    states_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, the final C and n, m at the tiles' ends, and the normaliser's sums.

    n and the sums are empty unless `normalize`. Nothing is differentiable in m.
    """
    from megarec_kernels.gated_linear_attention.gpu_launch import forward

    with torch.accelerator.device_index(q.device.index):
        return forward(
            make_plan(q, v, chunk_size), q, k, v, log_f, log_i, C_BHKV, n_BHK, m_BH, resets,
            scale, normalize, plain, states_dtype,
        )  # fmt: skip


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, log_i: Tensor | None, C_BHKV: Tensor,
    n_BHK: Tensor, m_BH: Tensor, resets: Tensor | None, scale: float, normalize: bool, plain: bool,
    chunk_size: int, states_dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    plan = make_plan(q, v, chunk_size)
    return (
        v.new_empty(v.shape),
        C_BHKV.new_empty(C_BHKV.shape),
        n_BHK.new_empty(n_BHK.shape),
        m_BH.new_empty(plan.B, plan.H, plan.num_tiles + 1),
        m_BH.new_empty(plan.B, plan.H, plan.padded) if normalize else m_BH.new_empty(0),
    )


@custom_op("megarec::gated_linear_attention_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dC_BHKV: Tensor,
    dn_BHK: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    log_i: Tensor | None,
    C_BHKV: Tensor,
    n_BHK: Tensor,
    resets: Tensor | None,
    y: Tensor | None,
    m_BHN: Tensor,
    sums_BHT: Tensor,
    scale: float,
    normalize: bool,
    plain: bool,
    chunk_size: int,
    states_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, log_f, log_i and of the initial C and n.

    y is needed only if `normalize`.
    """
    from megarec_kernels.gated_linear_attention.gpu_launch import backward

    with torch.accelerator.device_index(q.device.index):
        return backward(
            make_plan(q, v, chunk_size), dy, dC_BHKV, dn_BHK, q, k, v, log_f, log_i, C_BHKV, n_BHK,
            resets, y, m_BHN, sums_BHT, scale, normalize, plain, states_dtype,
        )  # fmt: skip


@_backward.register_fake
def _backward_fake(
    dy: Tensor, dC_BHKV: Tensor, dn_BHK: Tensor, q: Tensor, k: Tensor, v: Tensor, log_f: Tensor,
    log_i: Tensor | None, C_BHKV: Tensor, n_BHK: Tensor, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    like = (q, k, v, log_f, log_f, C_BHKV, n_BHK)
    return tuple(x.new_empty(x.shape) for x in like)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_f, log_i, C_BHKV, n_BHK, _, resets, *ctx.options = inputs
    y, _, _, m_BHN, sums_BHT = output
    normalize = sums_BHT.numel() > 0  # else no gradient depends on y
    ctx.save_for_backward(
        q, k, v, log_f, log_i, C_BHKV, n_BHK, resets, y if normalize else None, m_BHN, sums_BHT
    )


def _differentiate(
    ctx: Any, dy: Tensor, dC_BHKV: Tensor, dn_BHK: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dq, dk, dv, dlog_f, dlog_i, dC_BHKV, dn_BHK = _backward(
        dy, dC_BHKV, dn_BHK, *saved, *ctx.options
    )
    has_input_gate = saved[4] is not None
    gradients = dq, dk, dv, dlog_f, dlog_i if has_input_gate else None, dC_BHKV, dn_BHK
    return *gradients, *[None] * 7


_forward.register_autograd(_differentiate, setup_context=_save)
