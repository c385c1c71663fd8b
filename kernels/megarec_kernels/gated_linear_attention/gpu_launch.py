"""The order in which the Triton kernels of gated linear attention run, and on what blocks."""

from typing import Any

import torch
from torch import Tensor

from megarec_kernels.gated_linear_attention import gpu_kernels as kernels
from megarec_kernels.gated_linear_attention.gpu import Plan
from megarec_kernels.triton_tools import tl, triton, triton_dtype


def forward(
    plan: Plan,
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
    states_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, the final C and n, m at the tiles' ends, and the normaliser's sums."""
    q, k, v = map(_dense_rows, (q, k, v))
    docs = _count_resets(plan, resets, v.device)
    gates, totals = _sum_gates(plan, log_f, log_i, docs)
    m_BHN = gates.new_empty(plan.B, plan.H, plan.num_tiles + 1)
    kernels.carry_kernel[plan.B * plan.H,](
        gates, totals, m_BH.contiguous(), m_BHN, plan.num_tiles,
        BT=plan.tile, AHEAD=16, num_warps=1,
    )  # fmt: skip
    states, n_states, final, final_n = _walk_states(
        plan, k, v, gates, totals, m_BHN, C_BHKV, n_BHK, normalize, states_dtype
    )
    y = _empty(v)
    sums_BHT = gates.new_empty((plan.B, plan.H, plan.padded) if normalize else 0)
    blocks, options = _block_options(plan, q.dtype, states_dtype, plan.K, plan.V)
    kernels.query_kernel[plan.B * plan.H * plan.num_tiles, blocks](
        q, k, v, y, q, sums_BHT, sums_BHT, states, n_states, gates, docs, totals, m_BHN, gates,
        scale, plan.T, plan.num_tiles, plan.H,
        *_strides(q, k, v, y, q), plan.V, 1,
        GRADIENT=False, NORMALIZE=normalize, PLAIN=plain, HAS_RESETS=len(docs) > 0, **options,
    )  # fmt: skip
    return y, final, final_n, m_BHN, sums_BHT


def backward(
    plan: Plan,
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
    states_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, log_f, log_i and of the initial C and n."""
    q, k, v, dy = map(_dense_rows, (q, k, v, dy))
    y = dy if y is None else y
    docs = _count_resets(plan, resets, v.device)
    gates, totals = _sum_gates(plan, log_f, log_i, docs)
    states, n_states, _, _ = _walk_states(
        plan, k, v, gates, totals, m_BHN, C_BHKV, n_BHK, normalize, states_dtype
    )
    sizes = plan.T, plan.num_tiles, plan.H
    flags = {"NORMALIZE": normalize, "HAS_RESETS": len(docs) > 0}

    rows = gates.new_empty(plan.B, plan.H, kernels.NUM_ROWS, plan.padded)
    kernels.row_kernel[plan.B * plan.H * plan.num_tiles,](
        y, dy, gates, docs, m_BHN, sums_BHT, rows, scale, *sizes, *_strides(y, dy),
        V=plan.V, BT=plan.tile, BV=min(128, _padded(plan.V)), PLAIN=plain, **flags,
    )  # fmt: skip

    dstates = torch.empty_like(states)
    dn_states = torch.empty_like(n_states)
    dinitial, dinitial_n = _empty(C_BHKV), _empty(n_BHK)
    grid, options = _state_options(plan, v.dtype)
    through = gates.new_empty(grid[1] * grid[2], plan.B, plan.H, plan.num_chunks)
    kernels.state_gradient_kernel[grid](
        q, dy, gates, docs, totals, m_BHN, rows, states, n_states,
        dC_BHKV.contiguous(), dn_BHK.contiguous(), dstates, dn_states,
        dinitial, dinitial_n, through,
        *sizes, *_strides(q, dy), SPAN=triton.next_power_of_2(plan.tiles), **flags, **options,
    )  # fmt: skip

    dq, dk, dv = map(_empty, (q, k, v))
    blocks, options = _block_options(plan, q.dtype, states_dtype, plan.V, plan.K)
    queries, queries_outer, keys, keys_outer = (
        gates.new_empty(blocks, plan.B, plan.H, plan.padded) for _ in range(4)
    )
    kernels.query_kernel[plan.B * plan.G * plan.num_tiles, blocks](
        dy, v, k, dq, q, queries, queries_outer, states, n_states, gates, docs, totals, m_BHN, rows,
        scale, *sizes, *_strides(dy, v, k, dq, q), 1, plan.V,
        GRADIENT=True, PLAIN=plain, **flags, **options,
    )  # fmt: skip
    kernels.key_kernel[plan.B * plan.G * plan.num_tiles, blocks](
        v, dy, q, dk, k, keys, keys_outer, dstates, dn_states, gates, docs, totals, m_BHN, rows,
        *sizes, *_strides(v, dy, q, dk, k), 1, plan.V,
        OF_KEYS=True, **flags, **options,
    )  # fmt: skip
    blocks, options = _block_options(plan, q.dtype, states_dtype, plan.K, plan.V)
    kernels.key_kernel[plan.B * plan.H * plan.num_tiles, blocks](
        k, q, dy, dv, k, keys, keys_outer, dstates, dn_states, gates, docs, totals, m_BHN, rows,
        *sizes, *_strides(k, q, dy, dv, k), plan.V, 1,
        OF_KEYS=False, **flags, **options,
    )  # fmt: skip

    dlog_f, dlog_i = (gates.new_empty(plan.B, plan.T, plan.H) for _ in range(2))
    kernels.gate_gradient_kernel[plan.B * plan.H * plan.num_tiles,](
        queries, queries_outer, keys, keys_outer, through, docs, dlog_f, dlog_i,
        *sizes, plan.B * plan.H, num_blocks=len(keys), num_through=len(through),
        TILES=plan.tiles, BT=plan.tile, HAS_RESETS=len(docs) > 0,
    )  # fmt: skip
    return dq, dk, dv, dlog_f, dlog_i, dinitial, dinitial_n


def _sum_gates(
    plan: Plan, log_f: Tensor, log_i: Tensor | None, docs: Tensor
) -> tuple[Tensor, Tensor]:
    gates = log_f.new_empty(plan.B, plan.H, kernels.NUM_GATES, plan.padded)
    totals = log_f.new_empty(plan.B, plan.H, plan.num_tiles)
    log_i_strides = (0, 0, 0) if log_i is None else log_i.stride()
    kernels.gate_kernel[plan.B * plan.H * plan.num_tiles,](
        log_f, log_i, docs, gates, totals, plan.T, plan.num_tiles, plan.H,
        *log_f.stride(), *log_i_strides,
        BT=plan.tile, HAS_INPUT_GATE=log_i is not None, HAS_RESETS=len(docs) > 0,
    )  # fmt: skip
    return gates, totals


def _walk_states(
    plan: Plan,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    totals: Tensor,
    m_BHN: Tensor,
    C_BHKV: Tensor,
    n_BHK: Tensor,
    normalize: bool,
    states_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the states and n before each chunk, and the final ones."""
    before = plan.B, plan.H, plan.num_chunks
    states = C_BHKV.new_empty(*before, plan.K, plan.V, dtype=states_dtype)
    n_states = n_BHK.new_empty((*before, plan.K) if normalize else 0)
    final, final_n = _empty(C_BHKV), _empty(n_BHK)
    grid, options = _state_options(plan, v.dtype)
    kernels.state_kernel[grid](
        k, v, gates, totals, m_BHN, C_BHKV.contiguous(), n_BHK.contiguous(),
        states, n_states, final, final_n,
        plan.T, plan.num_tiles, plan.H, *_strides(k, v), NORMALIZE=normalize, **options,
    )  # fmt: skip
    return states, n_states, final, final_n


def _state_options(plan: Plan, dtype: torch.dtype) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return the grid and the options of a kernel that walks with blocks of a state."""
    half = dtype == torch.bfloat16
    BK, BV = min(64, _padded(plan.K)), min(128 if half else 64, _padded(plan.V))
    grid = plan.B * plan.H, triton.cdiv(plan.K, BK), triton.cdiv(plan.V, BV)
    return grid, {
        "K": plan.K, "V": plan.V, "R": plan.heads_per_group, "TILES": plan.tiles,
        "BT": plan.tile, "BK": BK, "BV": BV, **_precision(dtype),
        "num_warps": 4, "num_stages": 3 if half else 2,
    }  # fmt: skip


def _block_options(
    plan: Plan, dtype: torch.dtype, states_dtype: torch.dtype, DA: int, DC: int
) -> tuple[int, dict[str, Any]]:
    """Return the number of blocks of an output (.., DC) and the options of its kernel.

    Blocks are wide, since each computes the products over DA anew. Those are summed over blocks of
    DA, at least two where there are 8 warps: the compiler lets both halves of those compute all of
    a product that is not in a loop, and then runs out of registers.
    """
    half = dtype == torch.bfloat16
    BC = min(256 if half else 64, _padded(DC))
    num_warps = 8 if BC > 64 else 4
    BA = _padded(DA) if num_warps == 4 else max(16, _padded(DA) // 2)
    BA = min(BA, 128 if half else 32)
    precision = _precision(dtype)
    state_dot = precision["DOT"] if states_dtype == torch.bfloat16 else tl.float32
    return triton.cdiv(DC, BC), {
        "DA": DA, "DC": DC, "R": plan.heads_per_group, "TILES": plan.tiles,
        "SPAN": triton.next_power_of_2(plan.tiles), "BT": plan.tile, "BA": BA,
        "BS": min(64, BA), "BC": BC, "STATE_DOT": state_dot, **precision,
        "num_warps": num_warps, "num_stages": 2,
    }  # fmt: skip


def _precision(dtype: torch.dtype) -> dict[str, Any]:
    """Return in what matrix products are computed.

    float16 inputs are multiplied as tf32, which holds them exactly, and the products with gates in
    float32's range; float32 inputs as three tf32 products, nearly exact.
    """
    if dtype == torch.bfloat16:
        return {"DOT": triton_dtype(dtype), "PRECISION": "tf32"}
    return {"DOT": tl.float32, "PRECISION": "tf32" if dtype == torch.float16 else "tf32x3"}


def _count_resets(plan: Plan, resets: Tensor | None, device: torch.device) -> Tensor:
    """Return (B, padded tokens) int32: the resets in a token's tile, up to it; empty if none."""
    if resets is None:
        return torch.empty(0, dtype=torch.int32, device=device)
    padded = torch.nn.functional.pad(resets, (0, plan.padded - plan.T))
    tiles = padded.reshape(plan.B, plan.num_tiles, plan.tile)
    return tiles.cumsum(-1, dtype=torch.int32).view(plan.B, -1)


def _empty(x: Tensor) -> Tensor:
    """Return a tensor like x, contiguous whatever its strides."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dense_rows(x_BTHD: Tensor) -> Tensor:
    """Return x as it is, strides and all, if the dims of a head lie side by side."""
    return x_BTHD if x_BTHD.stride(-1) == 1 else x_BTHD.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _padded(dim: int) -> int:
    """Return the smallest block that holds a head dim: a power of 2, from 16."""
    return max(16, triton.next_power_of_2(dim))
