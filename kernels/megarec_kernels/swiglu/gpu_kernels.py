"""Kernels of swiglu in Triton: a program has BLOCK of the elements, in the order of memory."""

from megarec_kernels.triton_tools import narrow, tl, triton


@triton.jit
def forward_kernel(gate_ptr, up_ptr, y_ptr, size, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Write y = silu(gate) * up."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + i, mask=i < size, other=0).to(WIDE)
    up = tl.load(up_ptr + i, mask=i < size, other=0).to(WIDE)
    y = gate / (1 + tl.exp(-gate)) * up
    tl.store(y_ptr + i, narrow(y, y_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def backward_kernel(
    gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, size, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the gradients of gate and up."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + i, mask=i < size, other=0).to(WIDE)
    up = tl.load(up_ptr + i, mask=i < size, other=0).to(WIDE)
    dy = tl.load(dy_ptr + i, mask=i < size, other=0).to(WIDE)
    sigmoid = 1 / (1 + tl.exp(-gate))
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(dgate_ptr + i, narrow(dgate, dgate_ptr.dtype.element_ty), mask=i < size)
    dup = dy * gate * sigmoid
    tl.store(dup_ptr + i, narrow(dup, dup_ptr.dtype.element_ty), mask=i < size)
