"""Triton kernels of gated linear attention; gpu.py launches them in order.

The sequence is cut into tiles of BT tokens, and TILES of them make a chunk. Inside a tile gates add
up from its start, so that no sum runs over more than BT tokens; from tile to tile decays are
multiplied one by one. A program holds one tile (or a block of a state) and walks over the others.

Layouts that gpu.py allots, all float32: gates (B, H, 4, tokens) and rows (B, H, 2, tokens) hold a
plane for each quantity below, of whole tiles; totals (B, H, tiles); m (B, H, tiles + 1). docs
(B, tokens) int32 counts the resets of a tile up to a token. R value heads share a head of q and k.
"""

from megarec_kernels.gated_linear_attention.step import EPS as _EPS
from megarec_kernels.triton_tools import dot, narrow, tl, triton

EPS = tl.constexpr(_EPS)

# Planes of gates.
START = tl.constexpr(0)  # log decay from the start of the tile, or of the document if later
LOCAL_M = tl.constexpr(1)  # m, if nothing came before the tile
KEY = tl.constexpr(2)  # log_i - START: log weight of a key in its tile, up to a query's START - m
END = tl.constexpr(3)  # log weight of a key at the end of its tile; -inf if a reset follows
NUM_GATES = 4
# Planes of rows, known once y's gradient is.
FACTOR = tl.constexpr(0)  # y over the weighted sum of values
SLOPE = tl.constexpr(1)  # gradient of the normaliser's sum, over FACTOR
NUM_ROWS = 2

# Arguments that follow the batch, and that no load is aligned by: not to compile every kernel anew
# for lengths that happen to be, or not to be, multiples of 16.
SIZES = ("num_tokens", "num_tiles", "num_rows", "f_batch", "i_batch")


@triton.jit
def exist(dims, D: tl.constexpr, BD: tl.constexpr):
    """Tell which of a block's dims a head has: all, known at compile time, if blocks fill it."""
    if D % BD == 0:
        return tl.full(dims.shape, True, tl.int1)
    else:
        return dims < D


@triton.jit
def load_tile(
    x, token_stride, first, num_tokens, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """Load (BT, BD) at dim ``first`` of a tile; zeros beyond its tokens or dims."""
    tokens, dims = tl.arange(0, BT)[:, None], first + tl.arange(0, BD)[None, :]
    mask = (tokens < num_tokens) & exist(dims, D, BD)
    return tl.load(x + tokens * token_stride + dims, mask=mask, other=0.0)


@triton.jit
def load_turned(
    x, token_stride, first, num_tokens, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """Load what load_tile does, as (BD, BT)."""
    tokens, dims = tl.arange(0, BT)[None, :], first + tl.arange(0, BD)[:, None]
    mask = (tokens < num_tokens) & exist(dims, D, BD)
    return tl.load(x + tokens * token_stride + dims, mask=mask, other=0.0)


@triton.jit
def store_tile(
    x, value, token_stride, first, num_tokens, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """Store (BT, BD) where load_tile would load it."""
    tokens, dims = tl.arange(0, BT)[:, None], first + tl.arange(0, BD)[None, :]
    mask = (tokens < num_tokens) & exist(dims, D, BD)
    tl.store(x + tokens * token_stride + dims, narrow(value, x.dtype.element_ty), mask=mask)


@triton.jit
def query_gates(gates, num_padded, docs, tile_m, BT: tl.constexpr, HAS_RESETS: tl.constexpr):
    """Return START, START for what came before the tile (-inf after a reset) and m of a tile."""
    t = tl.arange(0, BT)
    start = tl.load(gates + START * num_padded + t)
    entered = start
    if HAS_RESETS:
        entered = tl.where(tl.load(docs + t) == 0, start, -float("inf"))
    m = tl.maximum(entered + tile_m, tl.load(gates + LOCAL_M * num_padded + t))
    return start, entered, m


@triton.jit
def same_tile(docs, BT: tl.constexpr, HAS_RESETS: tl.constexpr):
    """Return bool (BT, BT): a query (row) sees a key (column) of its own tile."""
    t = tl.arange(0, BT)
    seen = t[:, None] >= t[None, :]
    if HAS_RESETS:
        doc = tl.load(docs + t)
        seen = seen & (doc[:, None] == doc[None, :])
    return seen


@triton.jit
def output_factor(norm, m, scale, NORMALIZE: tl.constexpr, PLAIN: tl.constexpr):
    """Return what turns a sum of weighted values, in units of exp(m), into y."""
    if NORMALIZE:
        one = tl.exp(-m)
        eps = EPS * one if PLAIN else EPS
        return scale / (tl.maximum(tl.abs(norm), one) + eps)
    else:
        return scale * tl.exp(m)


@triton.jit(do_not_specialize=SIZES)
def gate_kernel(
    log_f, log_i, docs, gates, totals,
    num_tokens, num_tiles, num_heads,
    f_batch, f_token, f_head, i_batch, i_token, i_head,
    BT: tl.constexpr, HAS_INPUT_GATE: tl.constexpr, HAS_RESETS: tl.constexpr,
):  # fmt: skip
    """Add up the gates of a tile of a head: gates and totals.

    Sums are masked and of one document: a difference of running sums would carry the rounding of
    one document into the next.
    """
    pid = tl.program_id(0)
    h, tile, batch = pid % num_heads, pid // num_heads % num_tiles, pid // num_heads // num_tiles
    t = tl.arange(0, BT)
    token = (tile * BT + t).to(tl.int64)
    inside = token < num_tokens
    f = tl.load(
        log_f + batch.to(tl.int64) * f_batch + token * f_token + h * f_head, mask=inside, other=0.0
    ).to(tl.float32)
    if HAS_INPUT_GATE:
        i = tl.load(
            log_i + batch.to(tl.int64) * i_batch + token * i_token + h * i_head,
            mask=inside,
            other=-float("inf"),
        ).to(tl.float32)
    else:
        i = tl.where(inside, 0.0, -float("inf"))

    num_padded = num_tiles * BT
    docs += batch * num_padded + tile * BT
    seen = same_tile(docs, BT, HAS_RESETS)
    end = tl.sum(tl.where(t[:, None] > t[None, :], f[:, None], 0.0), 0) + i
    total = tl.sum(f, 0)
    if HAS_RESETS:
        doc = tl.load(docs + t)
        is_reset = doc != tl.load(docs + t - 1, mask=t > 0, other=0)
        last_doc = tl.max(doc, 0)
        end = tl.where(doc == last_doc, end, -float("inf"))
        total = tl.where(last_doc == 0, total, -float("inf"))
        # The gate of a reset decays nothing but the new document's m, which starts from 0.
        fresh = tl.sum(tl.where(seen & is_reset[None, :], f[None, :], 0.0), 1)
        f = tl.where(is_reset, 0.0, f)
    start = tl.sum(tl.where(seen, f[None, :], 0.0), 1)
    key = i - start
    local = tl.max(tl.where(seen, key[None, :], -float("inf")), 1)
    if HAS_RESETS:
        local = tl.where(doc == 0, local, tl.maximum(local, fresh))

    head = batch.to(tl.int64) * num_heads + h
    gates += head * 4 * num_padded + tile * BT
    tl.store(gates + START * num_padded + t, start)
    tl.store(gates + LOCAL_M * num_padded + t, start + local)
    tl.store(gates + KEY * num_padded + t, key)
    tl.store(gates + END * num_padded + t, end)
    tl.store(totals + head * num_tiles + tile, total)


@triton.jit(do_not_specialize=SIZES)
def carry_kernel(
    gates, totals, initial_m, m, num_tiles, BT: tl.constexpr, AHEAD: tl.constexpr
):  # fmt: skip
    """Walk a head's tiles: m before each, and after the last."""
    head = tl.program_id(0).to(tl.int64)
    num_padded = num_tiles * BT
    last = gates + (head * 4 + LOCAL_M) * num_padded + BT - 1
    totals += head * num_tiles
    m += head * (num_tiles + 1)
    value = tl.load(initial_m + head)
    tl.store(m, value)
    for first in range(0, num_tiles, AHEAD):
        # All loads of a stretch before its stores, which no load would overtake.
        decays, locals_m = (), ()
        for i in tl.static_range(AHEAD):
            j, inside = first + i, first + i < num_tiles
            decay = tl.load(totals + j, mask=inside, other=0.0)
            local_m = tl.load(last + j * BT, mask=inside, other=-float("inf"))
            decays += (decay,)
            locals_m += (local_m,)
        for i in tl.static_range(AHEAD):
            value = tl.maximum(value + decays[i], locals_m[i])
            tl.store(m + first + i + 1, value, mask=first + i < num_tiles)


@triton.jit(do_not_specialize=SIZES)
def state_kernel(
    k, v, gates, totals, m, initial, initial_n, states, n_states, final, final_n,
    num_tokens, num_tiles, num_heads,
    k_batch, k_token, k_head, v_batch, v_token, v_head,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk a head's tiles with a block of its state, in float32; store it before each chunk.

    states are (B, H, N, K, V), n_states (B, H, N, K); final and final_n are after the last tile.
    """
    head = tl.program_id(0).to(tl.int64)
    batch, h = head // num_heads, head % num_heads
    first_k, first_v = tl.program_id(1) * BK, tl.program_id(2) * BV
    num_chunks, num_padded = (num_tiles + TILES - 1) // TILES, num_tiles * BT
    k += batch * k_batch + (h // R) * k_head
    v += batch * v_batch + h * v_head
    ends = gates + (head * 4 + END) * num_padded
    totals += head * num_tiles
    m += head * (num_tiles + 1)

    dims_k, dims_v = first_k + tl.arange(0, BK), first_v + tl.arange(0, BV)
    place = dims_k[:, None] * V + dims_v[None, :]
    here = exist(dims_k[:, None], K, BK) & exist(dims_v[None, :], V, BV)
    here_n = dims_k < tl.where(first_v == 0, K, 0)
    states += head * num_chunks * K * V
    n_states += head * num_chunks * K
    state = tl.load(initial + head * K * V + place, mask=here, other=0.0)
    n = tl.full((BK,), 0.0, tl.float32)
    if NORMALIZE:
        n = tl.load(initial_n + head * K + dims_k, mask=dims_k < K, other=0.0)

    for j in range(num_tiles):
        if j % TILES == 0:
            tl.store(states + place, narrow(state, states.dtype.element_ty), mask=here)
            states += K * V
            if NORMALIZE:
                tl.store(n_states + dims_k, n, mask=here_n)
                n_states += K
        next_m = tl.load(m + j + 1)
        decay = tl.exp(tl.load(totals + j) + tl.load(m + j) - next_m)
        weight = tl.exp(tl.load(ends + j * BT + tl.arange(0, BT)) - next_m)
        left = num_tokens - j * BT
        k_KT = load_turned(k, k_token, first_k, left, K, BT, BK)
        v_TV = load_tile(v, v_token, first_v, left, V, BT, BV)
        k += BT * k_token
        v += BT * v_token
        k_KT = k_KT.to(tl.float32) * weight[None, :]
        state = dot(narrow(k_KT, DOT), v_TV.to(DOT), state * decay, PRECISION)
        if NORMALIZE:
            n = n * decay + tl.sum(k_KT, 1)

    tl.store(final + head * K * V + place, state, mask=here)
    if NORMALIZE:
        tl.store(final_n + head * K + dims_k, n, mask=here_n)


@triton.jit(do_not_specialize=SIZES)
def row_kernel(
    y, dy, gates, docs, m, sums, rows,
    scale, num_tokens, num_tiles, num_heads,
    y_batch, y_token, y_head, dy_batch, dy_token, dy_head,
    V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
    NORMALIZE: tl.constexpr, PLAIN: tl.constexpr, HAS_RESETS: tl.constexpr,
):  # fmt: skip
    """Compute rows of a tile of a head, from y and its gradient."""
    tile = tl.program_id(0) % num_tiles
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, h = head // num_heads, head % num_heads
    num_padded = num_tiles * BT
    token, left = (tile * BT).to(tl.int64), num_tokens - tile * BT
    y += batch * y_batch + h * y_head + token * y_token
    dy += batch * dy_batch + h * dy_head + token * dy_token
    t = tl.arange(0, BT)
    gates += head * 4 * num_padded + tile * BT
    docs += batch * num_padded + tile * BT
    tile_m = tl.load(m + head * (num_tiles + 1) + tile)
    _, _, m_T = query_gates(gates, num_padded, docs, tile_m, BT, HAS_RESETS)
    rows += head * 2 * num_padded + tile * BT
    if NORMALIZE:
        change = tl.full((BT,), 0.0, tl.float32)
        for first in range(0, V, BV):
            y_TV = load_tile(y, y_token, first, left, V, BT, BV).to(tl.float32)
            dy_TV = load_tile(dy, dy_token, first, left, V, BT, BV).to(tl.float32)
            change += tl.sum(y_TV * dy_TV, 1)
        norm = scale * tl.load(sums + head * num_padded + tile * BT + t)
        factor = output_factor(norm, m_T, scale, NORMALIZE, PLAIN)
        sign = tl.where(norm > 0, 1.0, tl.where(norm < 0, -1.0, 0.0))
        # y only depends on the normaliser where that is larger than 1.
        slope = tl.where(tl.abs(norm) > tl.exp(-m_T), -sign, 0.0)
        tl.store(rows + SLOPE * num_padded + t, slope * change)
    else:
        factor = output_factor(m_T, m_T, scale, NORMALIZE, PLAIN)
    tl.store(rows + FACTOR * num_padded + t, tl.where(t < left, factor, 0.0))


@triton.jit(do_not_specialize=SIZES)
def state_gradient_kernel(
    q, dy, gates, docs, totals, m, rows, states, n_states, dfinal, dfinal_n,
    dstates, dn_states, dinitial, dinitial_n, through,
    num_tokens, num_tiles, num_heads,
    q_batch, q_token, q_head, dy_batch, dy_token, dy_head,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_RESETS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk a head's tiles backwards with a block of the gradient of its state.

    dstates (B, H, N, K, V) are gradients of the states after each chunk. through (K blocks * V
    blocks, B, H, N) is the gradient of the log of a chunk's decay, but for what is inside.
    """
    head = tl.program_id(0).to(tl.int64)
    batch, h = head // num_heads, head % num_heads
    first_k, first_v = tl.program_id(1) * BK, tl.program_id(2) * BV
    num_chunks, num_padded = (num_tiles + TILES - 1) // TILES, num_tiles * BT
    q += batch * q_batch + (h // R) * q_head
    dy += batch * dy_batch + h * dy_head
    gates += head * 4 * num_padded
    rows += head * 2 * num_padded
    docs += batch * num_padded
    totals += head * num_tiles
    m += head * (num_tiles + 1)
    block = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    through += (block * tl.num_programs(0) + head) * num_chunks

    dims_k, dims_v = first_k + tl.arange(0, BK), first_v + tl.arange(0, BV)
    place = dims_k[:, None] * V + dims_v[None, :]
    here = exist(dims_k[:, None], K, BK) & exist(dims_v[None, :], V, BV)
    here_n = dims_k < tl.where(first_v == 0, K, 0)
    states += head * num_chunks * K * V
    n_states += head * num_chunks * K
    dstates += head * num_chunks * K * V
    dn_states += head * num_chunks * K
    dstate = tl.load(dfinal + head * K * V + place, mask=here, other=0.0)
    dn = tl.full((BK,), 0.0, tl.float32)
    if NORMALIZE:
        dn = tl.load(dfinal_n + head * K + dims_k, mask=dims_k < K, other=0.0)

    t = tl.arange(0, BT)
    for back in range(num_tiles):
        j = num_tiles - 1 - back
        if (back == 0) | (j % TILES == TILES - 1):
            chunk = (j // TILES).to(tl.int64)
            rounded = narrow(dstate, dstates.dtype.element_ty)
            tl.store(dstates + chunk * K * V + place, rounded, mask=here)
            before = tl.load(states + chunk * K * V + place, mask=here, other=0.0).to(tl.float32)
            product = tl.sum(dstate * before)
            if NORMALIZE:
                tl.store(dn_states + chunk * K + dims_k, dn, mask=here_n)
                before_n = tl.load(n_states + chunk * K + dims_k, mask=here_n, other=0.0)
                product += tl.sum(dn * before_n, 0)
            span = j // TILES * TILES + tl.arange(0, SPAN)
            decay = tl.sum(tl.load(totals + span, mask=span <= j, other=0.0), 0)
            decay = tl.exp(decay + (tl.load(m + j // TILES * TILES) - tl.load(m + j + 1)))
            tl.store(through + chunk, product * decay)
        tile_m = tl.load(m + j)
        decay = tl.exp(tl.load(totals + j) + tile_m - tl.load(m + j + 1))
        _, entered, m_T = query_gates(
            gates + j * BT, num_padded, docs + j * BT, tile_m, BT, HAS_RESETS
        )
        weight = tl.exp(entered + tile_m - m_T) * tl.load(rows + FACTOR * num_padded + j * BT + t)
        token, left = (j * BT).to(tl.int64), num_tokens - j * BT
        q_KT = load_turned(q + token * q_token, q_token, first_k, left, K, BT, BK)
        dy_TV = load_tile(dy + token * dy_token, dy_token, first_v, left, V, BT, BV)
        q_KT = q_KT.to(tl.float32) * weight[None, :]
        dstate = dot(narrow(q_KT, DOT), dy_TV.to(DOT), dstate * decay, PRECISION)
        if NORMALIZE:
            slope = tl.load(rows + SLOPE * num_padded + j * BT + t)
            dn = dn * decay + tl.sum(q_KT * slope[None, :], 1)

    tl.store(dinitial + head * K * V + place, dstate, mask=here)
    if NORMALIZE:
        tl.store(dinitial_n + head * K + dims_k, dn, mask=here_n)


@triton.jit
def scores(
    a, b, a_token, b_token, a_left, b_left,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return a @ b^T (BT, BT) of two tiles."""
    result = tl.full((BT, BT), 0.0, tl.float32)
    for first in range(0, D, BD):
        a_TD = load_tile(a, a_token, first, a_left, D, BT, BD).to(DOT)
        b_DT = load_turned(b, b_token, first, b_left, D, BT, BD).to(DOT)
        result = dot(a_TD, b_DT, result, PRECISION)
    return result


@triton.jit
def apply_state(
    a, state, a_token, a_left, state_row, state_column, first_c,
    DA: tl.constexpr, DC: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return a @ state (BT, BC) for a block of a state's columns."""
    result = tl.full((BT, BC), 0.0, tl.float32)
    columns = first_c + tl.arange(0, BC)[None, :]
    for first in range(0, DA, BS):
        rows = first + tl.arange(0, BS)[:, None]
        place = state + rows * state_row + columns * state_column
        mask = exist(rows, DA, BS) & exist(columns, DC, BC)
        state_AC = tl.load(place, mask=mask, other=0.0).to(DOT)
        a_TA = load_tile(a, a_token, first, a_left, DA, BT, BS).to(DOT)
        result = dot(a_TA, state_AC, result, PRECISION)
    return result


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    a, b, c, out, own, sums, outer, states, n_states, gates, docs, totals, m, rows,
    scale, num_tokens, num_tiles, num_heads,
    a_batch, a_token, a_head, b_batch, b_token, b_head, c_batch, c_token, c_head,
    out_batch, out_token, out_head, own_batch, own_token, own_head, state_row, state_column,
    DA: tl.constexpr, DC: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr,
    SPAN: tl.constexpr, BT: tl.constexpr, BA: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
    GRADIENT: tl.constexpr, NORMALIZE: tl.constexpr, PLAIN: tl.constexpr,
    HAS_RESETS: tl.constexpr, DOT: tl.constexpr, STATE_DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum up what the queries of a tile see: y, or with GRADIENT the gradient of q.

    y_t = factor_t (sum_s w_ts (q_t k_s) v_s + w_t q_t S), (a, b, c) = (q, k, v); and
    dq_t = factor_t (sum_s w_ts (dy_t v_s + slope_t) k_s + w_t (S dy_t + slope_t n)), summed over
    the heads of a group, (a, b, c) = (dy, v, k). S is the state before the chunk.

    sums (blocks of out, B, H, tokens) are the normaliser's in the first block. With GRADIENT they
    are those of the gradients of the logs of a query's weights, from the block's part of own = q:
    sums for keys in its chunk, and outer for all that came before.
    """
    tile = tl.program_id(0) % num_tiles
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    first_c = tl.program_id(1) * BC
    HEADS: tl.constexpr = R if GRADIENT else 1  # heads that share an output
    num_outs = num_heads // HEADS
    batch, o = row // num_outs, row % num_outs
    num_padded = num_tiles * BT
    num_chunks = (num_tiles + TILES - 1) // TILES
    chunk, chunk_tile = tile // TILES, tile // TILES * TILES
    token, left = (tile * BT).to(tl.int64), num_tokens - tile * BT
    docs += batch * num_padded + tile * BT
    t, c_dims = tl.arange(0, BT), first_c + tl.arange(0, BC)
    zeros_TT = tl.full((BT, BT), 0.0, tl.float32)

    acc_TC = tl.full((BT, BC), 0.0, tl.float32)
    if GRADIENT:
        own += batch * own_batch + o * own_head + token * own_token
        own_TC = load_tile(own, own_token, first_c, left, DC, BT, BC)
    for r in range(HEADS):
        h = o * HEADS + r
        score_head, value_head = (h, o) if GRADIENT else (h // R, h)
        head = batch * num_heads + h
        head_gates = gates + head * 4 * num_padded
        head_totals = totals + head * num_tiles
        tile_m = tl.load(m + head * (num_tiles + 1) + tile)
        chunk_m = tl.load(m + head * (num_tiles + 1) + chunk_tile)
        start, entered, m_T = query_gates(
            head_gates + tile * BT, num_padded, docs, tile_m, BT, HAS_RESETS
        )
        slope = tl.full((BT,), 0.0, tl.float32)
        factor = tl.full((BT,), 1.0, tl.float32)
        if GRADIENT:
            head_rows = rows + head * 2 * num_padded + tile * BT
            factor = tl.load(head_rows + FACTOR * num_padded + t)
            if NORMALIZE:
                slope = tl.load(head_rows + SLOPE * num_padded + t)
        head_a = a + batch * a_batch + score_head * a_head + token * a_token
        head_b = b + batch * b_batch + score_head * b_head
        head_c = c + batch * c_batch + value_head * c_head

        # What came before the chunk.
        span = chunk_tile + tl.arange(0, SPAN)
        decay = tl.sum(tl.load(head_totals + span, mask=span < tile, other=0.0), 0)
        weight = tl.exp(entered + decay + (chunk_m - m_T)) * factor
        state = states + (head * num_chunks + chunk) * DA * DC
        n_state = n_states + (head * num_chunks + chunk) * (DC if GRADIENT else DA)
        before_TC = apply_state(
            head_a, state, a_token, left, state_row, state_column, first_c,
            DA, DC, BT, BS, BC, STATE_DOT, PRECISION,
        )  # fmt: skip
        place = (tl.program_id(1) * (tl.num_programs(0) * HEADS) + head * num_tiles + tile) * BT
        head_sums = tl.full((BT,), 0.0, tl.float32)
        if GRADIENT:
            if NORMALIZE:
                n = tl.load(n_state + c_dims, mask=c_dims < DC, other=0.0)
                before_TC += slope[:, None] * n[None, :]
            own_sums = tl.sum(own_TC.to(tl.float32) * before_TC, 1)
            tl.store(outer + place + t, weight * own_sums)
        elif NORMALIZE:
            for first in range(0, DA, BA):
                dims = first + tl.arange(0, BA)
                n = tl.load(n_state + dims, mask=dims < DA, other=0.0)
                a_TA = load_tile(head_a, a_token, first, left, DA, BT, BA).to(tl.float32)
                head_sums += tl.sum(a_TA * n[None, :], 1)
            head_sums *= weight
        acc_TC += before_TC * weight[:, None]

        # The tile itself, then the tiles before it, to the start of the chunk.
        key = tl.load(head_gates + KEY * num_padded + tile * BT + t)
        if HAS_RESETS:
            doc = tl.load(docs + t)
        away = 0.0
        for back in range(tile - chunk_tile + 1):
            j, same = tile - back, back == 0
            j_token, j_left = (j * BT).to(tl.int64), num_tokens - j * BT
            end = tl.load(head_gates + END * num_padded + j * BT + t) + away
            away += tl.load(head_totals + j, mask=back > 0, other=0.0)
            log_weight = (tl.where(same, start, entered) - m_T)[:, None] + tl.where(same, key, end)[
                None, :
            ]
            seen = t[:, None] + back * BT >= t[None, :]
            if HAS_RESETS:
                seen = seen & ((doc[:, None] == doc[None, :]) | (back > 0))
            weight_TT = tl.exp(tl.where(seen, log_weight, -float("inf")))
            p_TT = scores(
                head_a, head_b + j_token * b_token, a_token, b_token, left, j_left,
                DA, BT, BA, DOT, PRECISION,
            )  # fmt: skip
            c_TC = load_tile(head_c + j_token * c_token, c_token, first_c, j_left, DC, BT, BC)
            if GRADIENT:
                p_TT = (p_TT + slope[:, None]) * (weight_TT * factor[:, None])
                own_TT = dot(own_TC.to(DOT), tl.trans(c_TC).to(DOT), zeros_TT, PRECISION)
                head_sums += tl.sum(p_TT * own_TT, 1)
            else:
                p_TT *= weight_TT
                head_sums += tl.sum(p_TT, 1)
            acc_TC = dot(narrow(p_TT, DOT), c_TC.to(DOT), acc_TC, PRECISION)

        if GRADIENT:
            tl.store(sums + place + t, head_sums)
        else:
            if NORMALIZE and first_c == 0:
                tl.store(sums + place + t, head_sums)
            acc_TC *= output_factor(scale * head_sums, m_T, scale, NORMALIZE, PLAIN)[:, None]
    out += batch * out_batch + o * out_head + token * out_token
    store_tile(out, acc_TC, out_token, first_c, left, DC, BT, BC)


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    a, b, c, out, own, sums, outer, dstates, dn_states, gates, docs, totals, m, rows,
    num_tokens, num_tiles, num_heads,
    a_batch, a_token, a_head, b_batch, b_token, b_head, c_batch, c_token, c_head,
    out_batch, out_token, out_head, own_batch, own_token, own_head, state_row, state_column,
    DA: tl.constexpr, DC: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr,
    SPAN: tl.constexpr, BT: tl.constexpr, BA: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
    OF_KEYS: tl.constexpr, NORMALIZE: tl.constexpr, HAS_RESETS: tl.constexpr,
    DOT: tl.constexpr, STATE_DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum up what the keys of a tile get from queries: the gradient of v, or OF_KEYS that of k.

    dv_s = sum_t w_ts factor_t (k_s q_t) dy_t + w_s k_s dS, (a, b, c) = (k, q, dy); and
    dk_s = sum_t w_ts factor_t (v_s dy_t + slope_t) q_t + w_s (dS v_s + dn), summed over the heads
    of a group, (a, b, c) = (v, dy, q). dS is the gradient of the state after the chunk.

    OF_KEYS also gives sums and outer (blocks of out, B, H, tokens) of the gradients of the logs of
    a key's weights, from the block's part of own = k: for queries in its chunk, and for all after.
    """
    tile = tl.program_id(0) % num_tiles
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    first_c = tl.program_id(1) * BC
    HEADS: tl.constexpr = R if OF_KEYS else 1  # heads that share an output
    num_outs = num_heads // HEADS
    batch, o = row // num_outs, row % num_outs
    num_padded = num_tiles * BT
    num_chunks, chunk = (num_tiles + TILES - 1) // TILES, tile // TILES
    chunk_end = tl.minimum((chunk + 1) * TILES, num_tiles)
    token, left = (tile * BT).to(tl.int64), num_tokens - tile * BT
    docs += batch * num_padded
    t, c_dims = tl.arange(0, BT), first_c + tl.arange(0, BC)
    zeros_TT = tl.full((BT, BT), 0.0, tl.float32)

    acc_TC = tl.full((BT, BC), 0.0, tl.float32)
    if OF_KEYS:
        own += batch * own_batch + o * own_head + token * own_token
        own_TC = load_tile(own, own_token, first_c, left, DC, BT, BC)
    for r in range(HEADS):
        h = o * HEADS + r
        score_head, value_head = (h, o) if OF_KEYS else (h // R, h)
        head = batch * num_heads + h
        head_gates = gates + head * 4 * num_padded
        head_rows = rows + head * 2 * num_padded
        head_totals = totals + head * num_tiles
        head_m = m + head * (num_tiles + 1)
        key = tl.load(head_gates + KEY * num_padded + tile * BT + t)
        end = tl.load(head_gates + END * num_padded + tile * BT + t)
        head_a = a + batch * a_batch + score_head * a_head + token * a_token
        head_b = b + batch * b_batch + score_head * b_head
        head_c = c + batch * c_batch + value_head * c_head

        # What comes after the chunk.
        span = chunk * TILES + tl.arange(0, SPAN)
        beyond = (span > tile) & (span < chunk_end)
        decay = tl.sum(tl.load(head_totals + span, mask=beyond, other=0.0), 0)
        weight = tl.exp(end + decay - tl.load(head_m + chunk_end))
        state = head * num_chunks + chunk
        after_TC = apply_state(
            head_a, dstates + state * DA * DC, a_token, left, state_row, state_column, first_c,
            DA, DC, BT, BS, BC, STATE_DOT, PRECISION,
        )  # fmt: skip
        place = (tl.program_id(1) * (tl.num_programs(0) * HEADS) + head * num_tiles + tile) * BT
        head_sums = tl.full((BT,), 0.0, tl.float32)
        if OF_KEYS:
            if NORMALIZE:
                dn = tl.load(dn_states + state * DC + c_dims, mask=c_dims < DC, other=0.0)
                after_TC += dn[None, :]
            own_sums = tl.sum(own_TC.to(tl.float32) * after_TC, 1)
            tl.store(outer + place + t, weight * own_sums)
        acc_TC += after_TC * weight[:, None]

        # The tile itself, then the tiles after it, to the end of the chunk.
        if HAS_RESETS:
            doc = tl.load(docs + tile * BT + t)
        away = 0.0
        for ahead in range(chunk_end - tile):
            j, same = tile + ahead, ahead == 0
            j_token, j_left = (j * BT).to(tl.int64), num_tokens - j * BT
            start, entered, m_T = query_gates(
                head_gates + j * BT, num_padded, docs + j * BT, tl.load(head_m + j), BT, HAS_RESETS
            )
            log_weight = (tl.where(same, start, entered) - m_T)[None, :] + tl.where(
                same, key, end + away
            )[:, None]
            seen = t[None, :] + ahead * BT >= t[:, None]
            if HAS_RESETS:
                seen = seen & ((doc[:, None] == doc[None, :]) | (ahead > 0))
            weight_TT = tl.exp(tl.where(seen, log_weight, -float("inf")))
            away += tl.load(head_totals + j, mask=ahead > 0, other=0.0)
            factor = tl.load(head_rows + FACTOR * num_padded + j * BT + t)
            p_TT = scores(
                head_a, head_b + j_token * b_token, a_token, b_token, left, j_left,
                DA, BT, BA, DOT, PRECISION,
            )  # fmt: skip
            if OF_KEYS and NORMALIZE:
                p_TT += tl.load(head_rows + SLOPE * num_padded + j * BT + t)[None, :]
            p_TT *= weight_TT * factor[None, :]
            c_TC = load_tile(head_c + j_token * c_token, c_token, first_c, j_left, DC, BT, BC)
            if OF_KEYS:
                own_TT = dot(own_TC.to(DOT), tl.trans(c_TC).to(DOT), zeros_TT, PRECISION)
                head_sums += tl.sum(p_TT * own_TT, 1)
            acc_TC = dot(narrow(p_TT, DOT), c_TC.to(DOT), acc_TC, PRECISION)

        if OF_KEYS:
            tl.store(sums + place + t, head_sums)
    out += batch * out_batch + o * out_head + token * out_token
    store_tile(out, acc_TC, out_token, first_c, left, DC, BT, BC)


@triton.jit
def add_blocks(x, block_size, num_blocks: tl.constexpr, BT: tl.constexpr):
    """Return (BT,), the sum over what blocks have for a tile."""
    result = tl.full((BT,), 0.0, tl.float32)
    for _ in range(num_blocks):
        result += tl.load(x + tl.arange(0, BT))
        x += block_size
    return result


@triton.jit(do_not_specialize=SIZES)
def gate_gradient_kernel(
    queries, queries_outer, keys, keys_outer, through, docs, dlog_f, dlog_i,
    num_tokens, num_tiles, num_heads, num_rows,
    num_blocks: tl.constexpr, num_through: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr,
    HAS_RESETS: tl.constexpr,
):  # fmt: skip
    """Add up the gradients of the gates of a tile of a head; dlog_f and dlog_i are (B, T, H).

    Weights are exp(query - key). d log_i is what a key gets; d log_f is what decays across the
    token get. Inside the chunk that is queries minus keys from here on, in its document; besides,
    what queries from here on get from before the chunk, what keys before the token get from after
    the chunk, and what goes through it. Nothing that was rounded differently cancels.
    """
    tile = tl.program_id(0) % num_tiles
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, h = head // num_heads, head % num_heads
    num_padded, num_chunks = num_tiles * BT, (num_tiles + TILES - 1) // TILES
    block_size = num_rows * num_padded
    chunk, t = tile // TILES, tl.arange(0, BT)
    chunk_end = tl.minimum((chunk + 1) * TILES, num_tiles)
    queries += head * num_padded
    queries_outer += head * num_padded
    keys += head * num_padded
    keys_outer += head * num_padded
    docs += batch * num_padded

    inner, outer, unbroken = 0.0, 0.0, 1.0
    through += head * num_chunks + chunk
    for _ in range(num_through):
        outer += tl.load(through)
        through += num_rows * num_chunks
    for back in range(tile - chunk * TILES):
        j = tile - 1 - back
        outer += tl.sum(add_blocks(keys_outer + j * BT, block_size, num_blocks, BT), 0)
    for ahead in range(chunk_end - tile - 1):
        j = tile + 1 + ahead
        outer += tl.sum(add_blocks(queries_outer + j * BT, block_size, num_blocks, BT), 0)
        rest = add_blocks(queries + j * BT, block_size, num_blocks, BT)
        rest -= add_blocks(keys + j * BT, block_size, num_blocks, BT)
        if HAS_RESETS:
            doc = tl.load(docs + j * BT + t)
            inner += unbroken * tl.sum(tl.where(doc == 0, rest, 0.0), 0)
            unbroken = tl.where(tl.max(doc, 0) == 0, unbroken, 0.0)
        else:
            inner += tl.sum(rest, 0)

    key = add_blocks(keys + tile * BT, block_size, num_blocks, BT)
    key_outer = add_blocks(keys_outer + tile * BT, block_size, num_blocks, BT)
    query_outer = add_blocks(queries_outer + tile * BT, block_size, num_blocks, BT)
    rest = add_blocks(queries + tile * BT, block_size, num_blocks, BT) - key
    later = t[:, None] >= t[None, :]
    seen = same_tile(docs + tile * BT, BT, HAS_RESETS)
    gradient = outer + tl.sum(
        tl.where(seen, rest[:, None], 0.0) + tl.where(later, query_outer[:, None], 0.0), 0
    )
    gradient += tl.sum(tl.where(t[:, None] > t[None, :], key_outer[None, :], 0.0), 1)
    if HAS_RESETS:
        doc = tl.load(docs + tile * BT + t)
        gradient += tl.where(doc == tl.max(doc, 0), inner, 0.0)
        is_reset = doc != tl.load(docs + tile * BT + t - 1, mask=t > 0, other=0)
        gradient = tl.where(is_reset, 0.0, gradient)
    else:
        gradient += inner
    token = tile * BT + t
    place = (batch * num_tokens + token) * num_heads + h
    tl.store(dlog_f + place, gradient, mask=token < num_tokens)
    tl.store(dlog_i + place, key + key_outer, mask=token < num_tokens)
