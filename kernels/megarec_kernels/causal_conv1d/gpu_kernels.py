"""Kernels of causal_conv1d in Triton: programs walk through time and read each number once.

A program has BLOCK_C channels and SEGMENT tokens. It keeps the last K - 1 tokens in registers, and
the age of the document, its tokens before this one, which says how many of them count. In the
backward it walks K - 1 tokens further, until the gradients of its own tokens are whole. Gradients
of weights leave as one sum a program. A kernel is compiled once for all T.

Triton's interpreter is slow at calls of functions, so the loops over tokens have few; and it does
not combine masks with scalars by &, so conditions on t bound the channels.
"""

from megarec_kernels.triton_tools import narrow, tl, triton


@triton.jit(do_not_specialize=("T",))
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    resets_ptr,
    tail_ptr,
    y_ptr,
    tail_after_ptr,
    T,
    C,
    K: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write y of one segment; the last one of a row also writes the tail."""
    b, start = _place(T, SEGMENT)
    c_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    weights, bias_C = _load_weights(weight_ptr, bias_ptr, c_C, C, K, WIDE)
    past, age = _load_past(x_ptr, resets_ptr, tail_ptr, b, start, c_C, T, C, K, WIDE)
    stop = start + SEGMENT
    # Past the end of the row the tail is written.
    stop = tl.where(stop < T, stop, T + K - 1)
    for t in tl.range(start, stop, loop_unroll_factor=4):
        token_C = (b * T + t) * C + c_C
        exists_C = c_C < tl.where(t < T, C, 0)
        x_C = tl.load(x_ptr + token_C, mask=exists_C, other=0).to(WIDE)
        if resets_ptr is not None:
            starts = tl.load(resets_ptr + b * T + t, mask=t < T, other=0)
            age = tl.where(starts, 0, age + 1)
        y_C = bias_C + x_C * weights[0]
        for j in tl.static_range(1, K):
            y_C += tl.where(j <= age, past[j - 1], 0) * weights[j]
        if SILU:
            y_C = y_C / (1 + tl.exp(-y_C))
        tl.store(y_ptr + token_C, narrow(y_C, y_ptr.dtype.element_ty), mask=exists_C)
        if K > 1:
            last_C = narrow(tl.where(age >= K - 1, past[K - 2], 0), y_ptr.dtype.element_ty)
            place_C = (b * (K - 1) + t - T) * C + c_C
            tl.store(tail_after_ptr + place_C, last_C, mask=c_C < tl.where(t < T, 0, C))
        past = ((x_C,) + past)[: K - 1]


@triton.jit(do_not_specialize=("T",))
def backward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    resets_ptr,
    tail_ptr,
    dy_ptr,
    dtail_after_ptr,
    dx_ptr,
    dtail_ptr,
    sums_ptr,
    T,
    C,
    K: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the gradients of one segment's tokens, and its sums of those of the weights."""
    b, start = _place(T, SEGMENT)
    c_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    weights, bias_C = _load_weights(weight_ptr, bias_ptr, c_C, C, K, WIDE)
    past, age = _load_past(x_ptr, resets_ptr, tail_ptr, b, start, c_C, T, C, K, WIDE)
    dbias_C = tl.zeros((BLOCK_C,), WIDE)
    dweights = (dbias_C,)
    partial = ()  # gradients of the last K - 1 tokens, as far as later ones have added to them
    for _ in tl.static_range(1, K):
        dweights += (dbias_C,)
        partial += (dbias_C,)
    stop = tl.minimum(start + SEGMENT, T)
    for t in tl.range(start, stop + K - 1, loop_unroll_factor=2):
        token_C = (b * T + t) * C + c_C
        exists_C = c_C < tl.where(t < T, C, 0)
        x_C = tl.load(x_ptr + token_C, mask=exists_C, other=0).to(WIDE)
        dy_C = tl.load(dy_ptr + token_C, mask=exists_C, other=0).to(WIDE)
        if resets_ptr is not None:
            starts = tl.load(resets_ptr + b * T + t, mask=t < T, other=0)
            age = tl.where(starts, 0, age + 1)
        seen = (x_C,)
        for j in tl.static_range(1, K):
            seen += (tl.where(j <= age, past[j - 1], 0),)
        if SILU:
            sum_C = bias_C
            for j in tl.static_range(K):
                sum_C += seen[j] * weights[j]
            gate_C = 1 / (1 + tl.exp(-sum_C))
            dy_C *= gate_C * (1 + sum_C * (1 - gate_C))
        own_C = tl.where(t < stop, dy_C, 0)
        dbias_C += own_C
        sums = ()
        for j in tl.static_range(K):
            sums += (dweights[j] + own_C * seen[j],)
        dweights = sums
        added = (dy_C * weights[0],)
        for j in tl.static_range(1, K):
            added += (partial[j - 1] + tl.where(j <= age, dy_C * weights[j], 0),)
        past = ((x_C,) + past)[: K - 1]
        partial = added[: K - 1]

        # No later token sees token s: its gradient is whole.
        s = t - (K - 1)
        dx_C = added[K - 1]
        if K > 1:
            kept_C = c_C < tl.where((t >= T) & (age >= K - 1), C, 0)
            place_C = (b * (K - 1) + t - T) * C + c_C
            dx_C += tl.load(dtail_after_ptr + place_C, mask=kept_C, other=0).to(WIDE)
            place_C = (b * (K - 1) + t) * C + c_C
            first_C = c_C < tl.where((start == 0) & (s < 0), C, 0)
            dtail_C = narrow(dx_C, dx_ptr.dtype.element_ty)
            tl.store(dtail_ptr + place_C, dtail_C, mask=first_C)
        place_C = (b * T + s) * C + c_C
        own_C = c_C < tl.where(s >= start, C, 0)
        tl.store(dx_ptr + place_C, narrow(dx_C, dx_ptr.dtype.element_ty), mask=own_C)
    place_C = tl.program_id(0).to(tl.int64) * (K + 1) * C + c_C
    for j in tl.static_range(K):
        tl.store(sums_ptr + place_C + (K - 1 - j) * C, dweights[j], mask=c_C < C)
    tl.store(sums_ptr + place_C + K * C, dbias_C, mask=c_C < C)


@triton.jit
def _place(T, SEGMENT: tl.constexpr):
    """Return the row of this program and its first token, of 64 bits, as offsets may need them."""
    num_segments = tl.cdiv(T, SEGMENT)
    piece = tl.program_id(0).to(tl.int64)
    return piece // num_segments, piece % num_segments * SEGMENT


@triton.jit
def _load_weights(weight_ptr, bias_ptr, c_C, C, K: tl.constexpr, WIDE: tl.constexpr):
    """Return the weights, that of the present token first, and the bias, or zeros."""
    weights = ()
    for j in tl.static_range(K):
        weight_C = tl.load(weight_ptr + c_C * K + K - 1 - j, mask=c_C < C, other=0)
        weights += (weight_C.to(WIDE),)
    bias_C = tl.zeros(c_C.shape, WIDE)
    if bias_ptr is not None:
        bias_C = tl.load(bias_ptr + c_C, mask=c_C < C, other=0).to(WIDE)
    return weights, bias_C


@triton.jit
def _load_past(
    x_ptr, resets_ptr, tail_ptr, b, start, c_C, T, C, K: tl.constexpr, WIDE: tl.constexpr
):
    """Return the K - 1 tokens before `start`, the last one first, and the age after the last.

    Before the first reset of a row, and without resets, the age lets all of them count.
    """
    past = ()
    age = tl.full((), K, tl.int32)
    for i in tl.static_range(K - 1):
        t = start - (K - 1) + i
        x_C = tl.load(x_ptr + (b * T + t) * C + c_C, mask=c_C < tl.where(t < 0, 0, C), other=0)
        if tail_ptr is not None:
            place_C = (b * (K - 1) + K - 1 + t) * C + c_C
            x_C += tl.load(tail_ptr + place_C, mask=c_C < tl.where(t < 0, C, 0), other=0)
        past = (x_C.to(WIDE),) + past
        if resets_ptr is not None:
            starts = tl.load(resets_ptr + b * T + t, mask=t >= 0, other=0)
            age = tl.where(starts, 0, age + 1)
    return past, age
