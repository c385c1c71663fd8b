"""Kernels of linear_cross_entropy in Triton: a program has one token's row of logits.

`row_kernel` reads a row twice, the second time from the cache where it is not too long for it.
Where ranks divide the vocabulary they meet in between: that is `statistics_kernel`, which reduces
what a rank has of a row, and `gradient_kernel`, which goes on from what all have.
"""

from megarec_kernels.triton_tools import narrow, tl, triton


@triton.jit
def row_kernel(
    logits_ptr,
    labels_ptr,
    weights_ptr,
    loss_ptr,
    V,
    IGNORE: tl.constexpr,
    CAP: tl.constexpr,
    Z_LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the loss of a row, without its weight, and over the logits their gradient with it."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    label = tl.load(labels_ptr + row)
    max_, sum_, known, label_logit = reduce_row(logits_ptr, label, V, CAP, WIDE, BLOCK_V)
    finish_row(
        logits_ptr,
        None if weights_ptr is None else weights_ptr + row,
        loss_ptr + row,
        label != IGNORE,
        label,
        tl.where(known, label_logit, float("nan")),
        max_ + tl.log(sum_),
        V,
        CAP,
        Z_LOSS,
        GRADIENT,
        WIDE,
        BLOCK_V,
    )


@triton.jit
def statistics_kernel(
    logits_ptr,
    labels_ptr,
    max_ptr,
    sums_ptr,
    V,
    FIRST,
    CAP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the largest logit that this rank has, and what ranks add up.

    That is the sum of exp(logit - largest), and in a second row of sums the label's logit, or 0
    where another rank has it.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row) - FIRST
    max_, sum_, here, label_logit = reduce_row(logits_ptr + row * V, label, V, CAP, WIDE, BLOCK_V)
    tl.store(max_ptr + row, max_)
    tl.store(sums_ptr + row, sum_)
    tl.store(sums_ptr + tl.num_programs(0) + row, tl.where(here, label_logit, 0))


@triton.jit
def gradient_kernel(
    logits_ptr,
    labels_ptr,
    weights_ptr,
    lse_ptr,
    label_logits_ptr,
    loss_ptr,
    V,
    FIRST,
    IGNORE: tl.constexpr,
    CAP: tl.constexpr,
    Z_LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write what row_kernel does, for this rank's logits, from the logsumexp over all ranks."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    finish_row(
        logits_ptr + row * V,
        None if weights_ptr is None else weights_ptr + row,
        loss_ptr + row,
        label != IGNORE,
        label - FIRST,
        tl.load(label_logits_ptr + row),
        tl.load(lse_ptr + row),
        V,
        CAP,
        Z_LOSS,
        GRADIENT,
        WIDE,
        BLOCK_V,
    )


@triton.jit
def reduce_row(logits_ptr, label, V, CAP: tl.constexpr, WIDE: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return of V logits the largest, the sum of exp(logit - largest), and the label's.

    Before the last comes whether the label is one of them; if not, its logit is any.
    """
    here = (label >= 0) & (label < V)
    # Before sums that all threads wait for: later the gradient may be there already.
    label_logit = tl.load(logits_ptr + tl.where(here, label, 0)).to(WIDE)
    max_V = tl.full((BLOCK_V,), -1e38, WIDE)  # finite: a difference of infinities would be NaN
    sum_V = tl.zeros((BLOCK_V,), WIDE)
    for start in tl.range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z_V = tl.load(logits_ptr + v, mask=v < V, other=float("-inf")).to(WIDE)
        if CAP is not None:
            z_V = tl.where(v < V, CAP * squashed(z_V, CAP), float("-inf"))
        larger_V = tl.maximum(max_V, z_V)
        sum_V = sum_V * tl.exp(max_V - larger_V) + tl.exp(z_V - larger_V)
        max_V = larger_V
    max_ = tl.max(max_V, 0)
    if CAP is not None:
        label_logit = CAP * squashed(label_logit, CAP)
    return max_, tl.sum(sum_V * tl.exp(max_V - max_), 0), here, label_logit


@triton.jit
def finish_row(
    logits_ptr,
    weight_ptr,
    loss_ptr,
    kept,
    label,
    label_logit,
    lse,
    V,
    CAP: tl.constexpr,
    Z_LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write a row's loss, and over V logits its gradient; lse is the logsumexp of all logits."""
    loss = lse - label_logit + Z_LOSS * lse * lse
    tl.store(loss_ptr, tl.where(kept, loss, 0))
    if GRADIENT:
        scale = tl.where(kept, 1, 0).to(WIDE)
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr).to(WIDE)
        for start in tl.range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            z_V = tl.load(logits_ptr + v, mask=v < V, other=0).to(WIDE)
            slope_V = scale
            if CAP is not None:
                tanh_V = squashed(z_V, CAP)
                z_V = CAP * tanh_V
                slope_V = scale * (1 - tanh_V * tanh_V)
            dz_V = tl.exp(z_V - lse) * (1 + 2 * Z_LOSS * lse) - tl.where(v == label, 1, 0)
            dz_V = tl.where(kept, dz_V * slope_V, 0)
            tl.store(logits_ptr + v, narrow(dz_V, logits_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def squashed(z, CAP: tl.constexpr):
    """Return tanh(z / CAP)."""
    return 2 / (1 + tl.exp(-2 / CAP * z)) - 1
