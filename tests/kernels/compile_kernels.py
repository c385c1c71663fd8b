"""Compiles the kernels that ops launch for an H100, on any machine; test_kernels_compile runs it.

Where a kernel would be launched it is only compiled, with its arguments as they are: what comes
out of the ops is uninitialised memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

SHARED_MEMORY = 227 * 1024
"""Bytes that a block of threads may have there."""


class H100:
    """What Triton asks its driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
    def launch(*arguments: object, **options: object) -> None:
        compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_MEMORY, kernel.__name__
        print(kernel.__module__, kernel.__name__)

    return launch


def linear_attention(
    T: int, R: int, K: int, V: int, chunk_size: int, dtype: torch.dtype, normalize: bool
) -> Tensor:
    B, G, H = 1, 2, 2 * R
    q, v = torch.randn(B, T, G, K, dtype=dtype), torch.randn(B, T, H, V, dtype=dtype)
    gates = torch.zeros(B, T, H)
    resets = torch.zeros(B, T, dtype=torch.bool) if normalize else None
    state = torch.zeros(B, H, K, V), torch.zeros(B, H, K if normalize else 0), torch.zeros(B, H)
    states_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    options = 0.1, normalize, not normalize, chunk_size, states_dtype
    inputs = q.requires_grad_(), q, v, gates, gates, *state, resets, *options
    return torch.ops.megarec.gated_linear_attention(*inputs)[0]


def conv(B: int, T: int, C: int, K: int, dtype: torch.dtype, whole: bool) -> Tensor:
    x, weight = torch.randn(B, T, C, dtype=dtype), torch.randn(C, K, dtype=dtype)
    bias, resets, tail = None, None, None
    if whole:
        bias, tail = torch.randn(C, dtype=dtype), torch.randn(B, K - 1, C, dtype=dtype)
        resets = torch.zeros(B, T, dtype=torch.bool)
    y, _ = torch.ops.megarec.causal_conv1d(x.requires_grad_(), weight, bias, resets, tail, whole)
    return y


def norm(N: int, D: int, group_dim: int, dtype: torch.dtype, whole: bool) -> Tensor:
    x, weight, gates = torch.randn(N, D, dtype=dtype), None, (None, None)
    if whole:
        weight, gates = torch.randn(D, dtype=dtype), torch.randn(2, N, D, dtype=dtype)
    x.requires_grad_()
    return torch.ops.megarec.grouped_norm(x, weight, *gates, group_dim, not whole, 1e-6)


def swiglu(size: int, dtype: torch.dtype) -> Tensor:
    gate, up = torch.randn(2, size, dtype=dtype).requires_grad_()
    return torch.ops.megarec.swiglu(gate, up)


def rotary(T: int, H: int, K: int, R: int, dtype: torch.dtype, interleaved: bool) -> Tensor:
    x = torch.randn(2, T, H, K, dtype=dtype).requires_grad_()
    return torch.ops.megarec.rotary(x, torch.randn(2, 2, T, 1, R), interleaved, False)


def cross_entropy(C: int, V: int, dtype: torch.dtype, whole: bool) -> None:
    logits, labels = torch.randn(C, V, dtype=dtype), torch.zeros(C, dtype=torch.int64)
    weights, cap = (torch.ones(C), 30.0) if whole else (None, None)
    torch.ops.megarec.cross_entropy_rows(logits, labels, weights, -100, cap, 1e-4, whole)
    lse, label_logits = torch.ops.megarec.cross_entropy_statistics(logits, labels, 7, cap)[1]
    rows = labels, weights, lse, label_logits
    torch.ops.megarec.cross_entropy_part(logits, *rows, 7, -100, cap, 1e-4, whole)


def main() -> None:
    driver.set_active(H100())
    JITFunction.__getitem__ = compile_only
    import megarec_kernels  # noqa: F401  # registers the ops

    for output in (
        # Heads of xLSTM 7B and of Mamba-2.
        linear_attention(512, 1, 256, 512, 256, torch.bfloat16, normalize=True),
        linear_attention(512, 16, 128, 64, 256, torch.bfloat16, normalize=False),
        conv(2, 256, 256, 4, torch.bfloat16, whole=True),
        conv(1, 1, 1, 2, torch.float32, whole=False),
        norm(1024, 4096, 512, torch.bfloat16, whole=True),
        norm(1, 1, 1, torch.float32, whole=False),
        swiglu(1024, torch.bfloat16),
        swiglu(1, torch.float32),
        rotary(64, 32, 128, 64, torch.bfloat16, interleaved=False),
        rotary(64, 8, 128, 32, torch.bfloat16, interleaved=True),
        rotary(1, 1, 7, 1, torch.float32, interleaved=True),
    ):
        output.sum().backward()
    linear_attention(150, 1, 512, 512, 64, torch.float32, normalize=False)
    cross_entropy(1024, 50304, torch.bfloat16, whole=True)
    cross_entropy(1, 1, torch.float32, whole=False)


if __name__ == "__main__":
    main()
