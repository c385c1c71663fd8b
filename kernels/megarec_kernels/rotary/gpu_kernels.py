"""The kernel of rotary in Triton: a program turns BLOCK_N heads, in the order (B, T, H)."""

from megarec_kernels.triton_tools import narrow, tl, triton


@triton.jit
def turn_kernel(
    x_ptr,
    rotation_ptr,
    y_ptr,
    N,
    T,
    H,
    x_stride_B,
    x_stride_T,
    x_stride_H,
    rotation_stride_B,
    rotation_stride_sin,
    K: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Write y of some of the N = B T H heads, of K dimensions of which 2 R turn.

    x and y are contiguous in the last dimension, y and the rotation in all but the rotation's B.
    """
    # Only what belongs to the whole program is divided in 64 bits, which is slow.
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    i = (first % H).to(tl.int32) + tl.arange(0, BLOCK_N)
    token = (first // H % T).to(tl.int32) + i // H
    b = (first // H // T + token // T)[:, None]
    t, h = (token % T).to(tl.int64)[:, None], (i % H).to(tl.int64)[:, None]
    n = (first + tl.arange(0, BLOCK_N))[:, None]
    x_ptrs = x_ptr + b * x_stride_B + t * x_stride_T + h * x_stride_H
    y_ptrs = y_ptr + n * K

    r = tl.arange(0, BLOCK_R)[None, :]
    turns = (n < N) & (r < R)
    cos_ptrs = rotation_ptr + b * rotation_stride_B + t * R + r
    cos = tl.load(cos_ptrs, mask=turns, other=0)
    sin = tl.load(cos_ptrs + rotation_stride_sin, mask=turns, other=0)
    if BACK:
        sin = -sin
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_R)[None, :]
        inside = (n < N) & (d < 2 * R)
        x = tl.load(x_ptrs + d, mask=inside, other=0).to(WIDE)
        x_first, x_second = tl.split(tl.reshape(x, (BLOCK_N, BLOCK_R, 2)))
    else:
        x_first = tl.load(x_ptrs + r, mask=turns, other=0).to(WIDE)
        x_second = tl.load(x_ptrs + R + r, mask=turns, other=0).to(WIDE)
    y_first = narrow(x_first * cos - x_second * sin, y_ptr.dtype.element_ty)
    y_second = narrow(x_second * cos + x_first * sin, y_ptr.dtype.element_ty)
    if INTERLEAVED:
        tl.store(y_ptrs + d, tl.interleave(y_first, y_second), mask=inside)
    else:
        tl.store(y_ptrs + r, y_first, mask=turns)
        tl.store(y_ptrs + R + r, y_second, mask=turns)

    if K > 2 * R:
        rest = 2 * R + tl.arange(0, BLOCK_REST)[None, :]
        stays = (n < N) & (rest < K)
        tl.store(y_ptrs + rest, tl.load(x_ptrs + rest, mask=stays, other=0), mask=stays)
