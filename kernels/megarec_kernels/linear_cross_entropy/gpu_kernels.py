"""The kernel of linear_cross_entropy in Triton: a program has one token's row of logits."""

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
    """Write the loss of a row, without its weight, and over the logits their gradient with it.

    The logits are read twice, the second time from the cache where a row is not too long for it.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    label = tl.load(labels_ptr + row)
    kept = label != IGNORE
    known = (label >= 0) & (label < V)
    # Before sums that all threads wait for: later the gradient may be there already.
    label_logit = tl.load(logits_ptr + tl.where(known, label, 0)).to(WIDE)
    label_logit = tl.where(known, label_logit, float("nan"))
    max_V = tl.full((BLOCK_V,), -1e38, WIDE)  # finite: a difference of infinities would be NaN
    sum_V = tl.zeros((BLOCK_V,), WIDE)
    for start in tl.range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z_V = tl.load(logits_ptr + v, mask=v < V, other=float("-inf")).to(WIDE)
        if CAP is not None:
            z_V = tl.where(v < V, CAP * (2 / (1 + tl.exp(-2 / CAP * z_V)) - 1), float("-inf"))
        larger_V = tl.maximum(max_V, z_V)
        sum_V = sum_V * tl.exp(max_V - larger_V) + tl.exp(z_V - larger_V)
        max_V = larger_V
    max_ = tl.max(max_V, 0)
    lse = max_ + tl.log(tl.sum(sum_V * tl.exp(max_V - max_), 0))
    if CAP is not None:
        label_logit = CAP * (2 / (1 + tl.exp(-2 / CAP * label_logit)) - 1)
    loss = lse - label_logit + Z_LOSS * lse * lse
    tl.store(loss_ptr + row, tl.where(kept, loss, 0))
    if GRADIENT:
        scale = tl.where(kept, 1, 0).to(WIDE)
        if weights_ptr is not None:
            scale *= tl.load(weights_ptr + row).to(WIDE)
        for start in tl.range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            z_V = tl.load(logits_ptr + v, mask=v < V, other=0).to(WIDE)
            slope_V = scale
            if CAP is not None:
                tanh_V = 2 / (1 + tl.exp(-2 / CAP * z_V)) - 1
                z_V = CAP * tanh_V
                slope_V = scale * (1 - tanh_V * tanh_V)
            dz_V = tl.exp(z_V - lse) * (1 + 2 * Z_LOSS * lse) - tl.where(v == label, 1, 0)
            dz_V = tl.where(kept, dz_V * slope_V, 0)
            tl.store(logits_ptr + v, narrow(dz_V, logits_ptr.dtype.element_ty), mask=v < V)
