"""Kernels of grouped_norm in Triton: a program has whole groups in registers.

x is (N, G, GROUP), rows of G groups. A tile is one group of BLOCK_N rows. A kernel is compiled once
for all N.
"""

from megarec_kernels.triton_tools import narrow, tl, triton


@triton.jit(do_not_specialize=("N",))
def forward_kernel(
    x_ptr,
    weight_ptr,
    gate_ptr,
    output_gate_ptr,
    y_ptr,
    N,
    G,
    GROUP: tl.constexpr,
    CENTER: tl.constexpr,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write y of one tile."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (n < N) & (d < GROUP)
    place = (n * G + tl.program_id(1)) * GROUP + d
    u = tl.load(x_ptr + place, mask=inside, other=0).to(WIDE)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + place, mask=inside, other=0).to(WIDE)
        u *= gate / (1 + tl.exp(-gate))
    if CENTER:
        u = tl.where(inside, u - tl.sum(u, 1)[:, None] / GROUP, 0)
    y = u / tl.sqrt(tl.sum(u * u, 1)[:, None] / GROUP + EPS)
    if weight_ptr is not None:
        weight_ptrs = weight_ptr + tl.program_id(1) * GROUP + d
        y *= tl.load(weight_ptrs, mask=d < GROUP, other=0).to(WIDE)
    if output_gate_ptr is not None:
        output_gate = tl.load(output_gate_ptr + place, mask=inside, other=0).to(WIDE)
        y /= 1 + tl.exp(-output_gate)
    tl.store(y_ptr + place, narrow(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("N",))
def backward_kernel(
    x_ptr,
    weight_ptr,
    gate_ptr,
    output_gate_ptr,
    dy_ptr,
    dx_ptr,
    dgate_ptr,
    doutput_gate_ptr,
    sums_ptr,
    N,
    G,
    GROUP: tl.constexpr,
    CENTER: tl.constexpr,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write gradients of x and gates for every num_programs-th tile, and one sum of weight's."""
    d = tl.arange(0, BLOCK_D)[None, :]
    if weight_ptr is not None:
        weight_ptrs = weight_ptr + tl.program_id(1) * GROUP + d
        weight = tl.load(weight_ptrs, mask=d < GROUP, other=0).to(WIDE)
        dweight = tl.zeros((BLOCK_N, BLOCK_D), WIDE)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        n = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        inside = (n < N) & (d < GROUP)
        place = (n * G + tl.program_id(1)) * GROUP + d
        x = tl.load(x_ptr + place, mask=inside, other=0).to(WIDE)
        dy = tl.load(dy_ptr + place, mask=inside, other=0).to(WIDE)
        u = x
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + place, mask=inside, other=0).to(WIDE)
            sigmoid = 1 / (1 + tl.exp(-gate))
            u *= gate * sigmoid
        if CENTER:
            u = tl.where(inside, u - tl.sum(u, 1)[:, None] / GROUP, 0)
        scale = 1 / tl.sqrt(tl.sum(u * u, 1)[:, None] / GROUP + EPS)
        normed = u * scale
        if output_gate_ptr is not None:
            output_gate = tl.load(output_gate_ptr + place, mask=inside, other=0).to(WIDE)
            opened = 1 / (1 + tl.exp(-output_gate))
            change = dy * normed * opened * (1 - opened)
            if weight_ptr is not None:
                change *= weight
            change = narrow(change, doutput_gate_ptr.dtype.element_ty)
            tl.store(doutput_gate_ptr + place, change, mask=inside)
            dy *= opened
        if weight_ptr is not None:
            dweight += dy * normed
            dy *= weight
        du = dy - normed * (tl.sum(dy * normed, 1)[:, None] / GROUP)
        if CENTER:
            du -= tl.sum(dy, 1)[:, None] / GROUP
        du *= scale
        if gate_ptr is not None:
            dgate = du * x * sigmoid * (1 + gate * (1 - sigmoid))
            tl.store(dgate_ptr + place, narrow(dgate, dgate_ptr.dtype.element_ty), mask=inside)
            du *= gate * sigmoid
        tl.store(dx_ptr + place, narrow(du, dx_ptr.dtype.element_ty), mask=inside)
    if weight_ptr is not None:
        sums_ptrs = sums_ptr + (tl.program_id(0) * G + tl.program_id(1)) * GROUP + d
        tl.store(sums_ptrs, tl.sum(dweight, 0)[None, :], mask=d < GROUP)
