"""All kernels compile for a GPU: Triton's interpreter takes much that its compiler refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = {
    f"megarec_kernels.{op}.gpu_kernels {direction}_kernel"
    for op in ("causal_conv1d", "grouped_norm", "swiglu")
    for direction in ("forward", "backward")
}
KERNELS |= {
    f"megarec_kernels.linear_cross_entropy.gpu_kernels {name}_kernel"
    for name in ("row", "statistics", "gradient")
}
KERNELS |= {"megarec_kernels.rotary.gpu_kernels turn_kernel"}
KERNELS |= {
    f"megarec_kernels.gated_linear_attention.gpu_kernels {name}_kernel"
    for name in (
        *("gate", "carry", "state", "query", "row", "state_gradient", "key", "gate_gradient"),
    )
}


def test_kernels_compile_for_an_h100(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == KERNELS
