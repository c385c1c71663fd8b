"""Norms over groups of channels: RMSNorm and LayerNorm without a bias, each with gates."""

from torch import Tensor

from megarec_kernels.dispatch import choose_backend
from megarec_kernels.grouped_norm.eager import grouped_norm_eager
from megarec_kernels.grouped_norm.gpu import gpu_problem, grouped_norm_gpu
from megarec_kernels.grouped_norm.reference import grouped_norm_reference

__all__ = ["grouped_norm"]

FORMS = {
    "reference": grouped_norm_reference,
    "eager": grouped_norm_eager,
    "gpu": grouped_norm_gpu,
}


def grouped_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    group_dim: int | None = None,
    gate: Tensor | None = None,
    output_gate: Tensor | None = None,
    center: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return u / sqrt(mean(u^2) + eps) * weight * sigmoid(output_gate), groups by themselves.

    u is x (RMSNorm, arXiv 1910.07467, eq. 4), or x * silu(gate) (Mamba-2, arXiv 2405.21060,
    section 7), minus its mean over the group if centred (LayerNorm, arXiv 1607.06450). The output
    gate is that of the mLSTM (arXiv 2503.13427, section 3). All but the weight is computed in
    float32 at least.

    Args:
        x: (..., D), any float dtype.
        weight: (D,), any float dtype; None means 1.
        eps: Added to the mean square, > 0.
        group_dim: Channels of a group; divides D. None means all.
        gate: Shape of x, any float dtype; the computation and the result are in its dtype, not
            x's.
        output_gate: Shape of x, any float dtype; None means no gate.
        center: Subtract the mean.
        backend: "auto", "reference", "eager" or "gpu" (Triton, for groups of up to 16384
            channels); MEGAREC_KERNELS overrides it.

    Returns:
        (..., D) in the dtype of x, or of the gate, promoted with that of the weight.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    _check(x, weight, eps, group_dim, {"gate": gate, "output_gate": output_gate})
    group_dim = x.shape[-1] if group_dim is None else group_dim
    problem = gpu_problem(x, group_dim)
    fastest = "gpu" if x.is_cuda and problem is None else "eager"
    form = FORMS[choose_backend("grouped_norm", backend, FORMS, fastest, problem)]
    return form(x, weight, gate, output_gate, group_dim, center, eps)


def _check(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    group_dim: int | None,
    gates: dict[str, Tensor | None],
) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        _fail("x", f"shape {tuple(x.shape)}", "(..., D) with at least one channel")
    if not x.is_floating_point():
        _fail("x", str(x.dtype), "a float dtype")
    D = x.shape[-1]
    if weight is not None and weight.shape != (D,):
        _fail("weight", f"shape {tuple(weight.shape)}", f"({D},)")
    if not eps > 0:
        _fail("eps", str(eps), "a number > 0")
    if group_dim is not None and (group_dim < 1 or D % group_dim):
        _fail("group_dim", str(group_dim), f"a divisor of {D}")
    for name, gate in gates.items():
        if gate is not None and (gate.shape != x.shape or not gate.is_floating_point()):
            _fail(name, f"{gate.dtype} {tuple(gate.shape)}", f"a float dtype, {tuple(x.shape)}")


def _fail(argument: str, got: str, expected: str) -> None:
    raise ValueError(f"grouped_norm: {argument}: got {got}, expected {expected}")
