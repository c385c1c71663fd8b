"""Compile every kernel of gated_linear_attention for an H100, without one; run by a test.

Triton's interpreter checks neither types nor shared memory. A driver that only names the target is
enough for the compiler.
"""

from types import SimpleNamespace

import torch
from megarec_kernels.gated_linear_attention import gpu_launch
from megarec_kernels.gated_linear_attention.gpu import make_plan
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_MEMORY = 227 * 1024
launch = JITFunction.run


def compile_only(kernel, *args, warmup, **options):
    compiled = launch(kernel, *args, warmup=True, **options)
    assert compiled.metadata.shared <= SHARED_MEMORY, f"{kernel.fn.__name__}: shared memory"
    assert "sm_90a" in compiled.asm["ptx"]
    print(kernel.fn.__name__)


def main(K: int = 32, V: int = 64) -> None:
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    JITFunction.run = compile_only
    B, T, G, H = 1, 150, 1, 2
    q, v = (torch.zeros(B, T, *dims, dtype=torch.bfloat16) for dims in ((G, K), (H, V)))
    gate, C, n = torch.zeros(B, T, H), torch.zeros(B, H, K, V), torch.zeros(B, H, K)
    resets, m = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, H)
    plan, options = make_plan(q, v, 128), (0.1, True, False, torch.bfloat16)
    outputs = gpu_launch.forward(plan, q, q, v, gate, gate, C, n, m, resets, *options)
    y, final, final_n, *saved = outputs
    inputs = q, q, v, gate, gate, C, n, resets
    gpu_launch.backward(plan, y, final, final_n, *inputs, y, *saved, *options)


if __name__ == "__main__":
    main()
