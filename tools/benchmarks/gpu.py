"""The GPU suite: recurrent cells, small kernels and the loss against peers, a slice of xLSTM 7B.

With `SMOKE` the same code runs at tiny sizes, on a CPU.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.block import block_slice
from benchmarks.gpu_cells import cells
from benchmarks.gpu_forms import SMOKE, Sizes, drawer
from benchmarks.gpu_ops import convolution, loss, pointwise
from benchmarks.protocol import Clock
from benchmarks.race import timed
from benchmarks.report import Quantity, Result

__all__ = ["PARTS", "SMOKE", "Sizes"]


def calibration(sizes: Sizes, clock: Clock) -> Iterator[Result]:
    """What the device does at best: matmuls, and copies (bytes read and written)."""
    draw = drawer(sizes, clock.device)
    for M, K, N in sizes.matmuls:
        a, b = draw(M, K), draw(N, K)
        seconds = timed(lambda a=a, b=b: F.linear(a, b), clock, sizes.rounds).median
        rate = 2 * M * K * N / seconds / 1e12
        yield Quantity("calibration", f"matmul {M} x {K} x {N}", rate, "TFLOP/s")
    source = torch.empty(sizes.copied_bytes, dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), clock, sizes.rounds).median
    yield Quantity("calibration", "copy", 2 * sizes.copied_bytes / seconds / 1e9, "GB/s")


Part = Callable[[Sizes, Clock], Iterator[Result]]

PARTS: dict[str, Part] = {
    "calibration": calibration,
    "cells": cells,
    "conv": convolution,
    "pointwise": pointwise,
    "loss": loss,
    "block": block_slice,
}
