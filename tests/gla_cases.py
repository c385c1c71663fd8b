"""Random inputs and comparisons shared by the tests of gated_linear_attention."""

import torch
import torch.nn.functional as F
from megarec_kernels.gated_linear_attention import gated_linear_attention
from torch import Tensor


def make_inputs(
    B: int = 2,
    T: int = 13,
    G: int = 2,
    H: int = 2,
    Dk: int = 3,
    Dv: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return q, k, v, log_f, log_i drawn in float64, then rounded."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    return {
        "q": draw(B, T, G, Dk),
        "k": draw(B, T, G, Dk),
        "v": draw(B, T, H, Dv),
        "log_f": F.logsigmoid(draw(B, T, H) + 2),
        "log_i": draw(B, T, H),
    }


def make_state(
    inputs: dict[str, Tensor], gate: str, normalize: bool, seed: int = 1
) -> dict[str, Tensor]:
    """Return a random state that fits the inputs, in their dtype (at least float32)."""
    rng = torch.Generator().manual_seed(seed)
    B, _, H, Dv = inputs["v"].shape
    Dk = inputs["q"].shape[-1]
    shapes: dict[str, tuple[int, ...]] = {"C": (B, H, Dk, Dv)}
    if normalize:
        shapes["n"] = (B, H, Dk)
    if gate == "exp":
        shapes["m"] = (B, H)
    dtype = torch.promote_types(inputs["v"].dtype, torch.float32)
    return {
        key: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
        for key, shape in shapes.items()
    }


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: x.to(dtype) for key, x in tensors.items()}


def outputs_and_gradients(
    inputs: dict[str, Tensor], state: dict[str, Tensor] | None, seed: int = 2, **options
) -> dict[str, Tensor]:
    """Return y, the final state, log_decay and the gradients of a random function of them all."""
    leaves = {key: x.clone().requires_grad_() for key, x in inputs.items()}
    if state is not None:
        state = {key: x.clone().requires_grad_(key != "m") for key, x in state.items()}
        leaves |= {f"state.{key}": x for key, x in state.items() if key != "m"}
    arguments = {key: leaves[key] for key in inputs}
    y, final, log_decay = gated_linear_attention(**arguments, state=state, **options)
    results = {"y": y, "log_decay": log_decay, **{f"final.{key}": x for key, x in final.items()}}

    rng = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64)
    for name, x in results.items():
        weight = torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x)
        if name != "final.m":
            loss = loss + (x * weight).masked_fill(x.isinf(), 0).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    results |= {f"d{key}": g for key, g in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in results.items()}


def assert_rms(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """Compare the RMS error of each tensor with its RMS; infinities must be the same.

    An RMS below 0.1 counts as that: what is left where terms of size 1 cancel is their rounding.
    """
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got, want = actual[name].double(), want.double()
        infinite = want.isinf()
        assert torch.equal(got[infinite], want[infinite]), f"{name}: infinities differ"
        error = (got - want)[~infinite].norm()
        allowed = bound * want[~infinite].norm().clamp_min(0.1 * want.numel() ** 0.5)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare each tensor relative to its largest finite entry; infinities must be the same."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name].double()
        want = want.double()
        assert not got.isnan().any(), f"{name} has NaN"
        infinite = want.isinf()
        assert torch.equal(got[infinite], want[infinite]), f"{name}: infinities differ"
        error = (got[~infinite] - want[~infinite]).abs()
        size = want[~infinite].abs()
        bound = tolerance * max(1.0, size.max().item() if size.numel() else 0.0)
        assert (error <= bound).all(), f"{name}: error {error.max():.3g}, allowed {bound:.3g}"
