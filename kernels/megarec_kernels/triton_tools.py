"""Triton, imported here alone, and what its interpreter on the CPU does not get right by itself.

Kernels import ``triton`` and ``tl`` from here, and a module with kernels is imported when one runs.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("GPU kernels need Triton; install it: pip install triton") from error

__all__ = ["INTERPRET", "dot", "narrow", "tl", "triton", "triton_dtype"]

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run on the CPU, in Triton's interpreter: TRITON_INTERPRET=1 at import time."""


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name of a torch dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a @ b, summed in float32; PRECISION is for operands in float32.

    The interpreter multiplies the bit patterns of bfloat16: there both become float32, exactly.
    """
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Return float32 x in a dtype, rounded to nearest even, which the interpreter does not do."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        kept = tl.where(x == x, rounded, bits) & 0xFFFF0000
        return kept.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(dtype)
