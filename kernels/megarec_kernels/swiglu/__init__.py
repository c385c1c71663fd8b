"""The gated activation of SwiGLU, which keeps nothing but its inputs for the backward."""

from torch import Tensor

from megarec_kernels.dispatch import choose_backend, triton_problem
from megarec_kernels.swiglu.eager import swiglu_eager
from megarec_kernels.swiglu.gpu import swiglu_gpu
from megarec_kernels.swiglu.reference import swiglu_reference

__all__ = ["swiglu"]

FORMS = {"reference": swiglu_reference, "eager": swiglu_eager, "gpu": swiglu_gpu}


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """Return silu(gate) * up, silu(a) = a * sigmoid(a) (arXiv 2002.05202, eq. 6).

    The backward computes silu again. A sigmoid is computed in promote_types(gate.dtype, float32).

    Args:
        gate: any shape and float dtype.
        up: shape and dtype of gate.
        backend: "auto", "reference", "eager" or "gpu" (Triton); MEGAREC_KERNELS overrides it.

    Returns:
        The product, of gate's shape and dtype.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    if not gate.is_floating_point():
        raise ValueError(f"swiglu: gate: got {gate.dtype}, expected a float dtype")
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"swiglu: up: got {up.dtype} {tuple(up.shape)}, "
            f"expected that of gate, {gate.dtype} {tuple(gate.shape)}"
        )
    problem = triton_problem(gate)
    fastest = "gpu" if gate.is_cuda and problem is None else "eager"
    return FORMS[choose_backend("swiglu", backend, FORMS, fastest, problem)](gate, up)
