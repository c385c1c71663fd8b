"""Distillation loss: each form against formulas in float64, forward and every gradient."""

from typing import Any

import pytest
import torch
from megarec_kernels.linear_cross_entropy import linear_cross_entropy
from megarec_kernels.linear_distillation import linear_distillation
from torch import Tensor
from torch.nn import functional as F

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
WEIGHTS = {"kl_weight": 0.7, "ce_weight": 0.4, "temperature": 1.7, "z_loss": 0.01}


def make_inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    labels = torch.randint(23, (2, 7), generator=rng)
    labels[0, 2] = labels[1, -1] = -100
    return {
        "x": draw(2, 7, 5),
        "weight": draw(23, 5),
        "teacher_x": draw(2, 7, 3),
        "teacher_weight": draw(23, 3),
        "labels": labels,
    }


def by_formula(inputs: dict[str, Tensor], divergence: str, **options: Any) -> Tensor:
    """The loss from torch's own kl_div and cross_entropy, token by token."""
    kept = inputs["labels"] != -100
    z, teacher = (inputs[f"{who}x"][kept] @ inputs[f"{who}weight"].T for who in ("", "teacher_"))
    if options.get("soft_cap"):
        z = options["soft_cap"] * torch.tanh(z / options["soft_cap"])
    t = options["temperature"]
    q, p = (z / t).log_softmax(-1), (teacher / t).log_softmax(-1)
    pair = (q, p) if divergence == "forward_kl" else (p, q)
    kl = F.kl_div(*pair, reduction="sum", log_target=True)
    ce = F.cross_entropy(z, inputs["labels"][kept], reduction="sum")
    ce = ce + options["z_loss"] * z.logsumexp(-1).square().sum()
    return options["kl_weight"] * t**2 * kl + options["ce_weight"] * ce


def gradients(loss: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [inputs["x"], inputs["weight"]]))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_loss_and_gradients(
    dtype: torch.dtype, backend: str, divergence: Any, soft_cap: float | None
) -> None:
    exact = make_inputs(dtype)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in exact.items()}
    inputs = make_inputs(dtype)
    for tensors in (exact, inputs):
        tensors["x"].requires_grad_()
        tensors["weight"].requires_grad_()
    expected = by_formula(exact, divergence, soft_cap=soft_cap, **WEIGHTS)
    found = linear_distillation(
        **inputs,
        divergence=divergence,
        soft_cap=soft_cap,
        chunk_size=4,
        backend=backend,
        **WEIGHTS,
    )
    bound = BOUNDS[dtype]
    assert abs(found.loss.item() - expected.item()) <= bound * abs(expected.item())
    weighed = (
        WEIGHTS["kl_weight"] * WEIGHTS["temperature"] ** 2 * found.divergence
        + WEIGHTS["ce_weight"] * found.cross_entropy
    )
    torch.testing.assert_close(weighed, found.loss.detach(), rtol=1e-5, atol=0)
    # A factor on the loss must reach the gradients, which are made in the forward.
    pairs = zip(gradients(3 * found.loss, inputs), gradients(3 * expected, exact), strict=True)
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    inputs = make_inputs()
    inputs |= {"teacher_x": inputs["x"], "teacher_weight": inputs["weight"]}
    inputs["x"] = inputs["x"].clone().requires_grad_()
    for divergence in ("forward_kl", "reverse_kl"):
        found = linear_distillation(**inputs, divergence=divergence)
        (gradient,) = torch.autograd.grad(found.loss, inputs["x"])
        assert found.loss.abs() < 1e-12 and gradient.abs().max() < 1e-12
        plain = linear_cross_entropy(inputs["x"], inputs["weight"], inputs["labels"])
        torch.testing.assert_close(found.cross_entropy, plain.detach())


def test_only_what_needs_a_gradient_gets_one() -> None:
    inputs = make_inputs()
    inputs["x"].requires_grad_()
    linear_distillation(**inputs).loss.backward()
    assert inputs["x"].grad is not None and inputs["weight"].grad is None
    with torch.no_grad():
        assert not linear_distillation(**inputs).loss.requires_grad


def test_no_labels_give_zero() -> None:
    inputs = make_inputs()
    inputs["labels"].fill_(-100)
    inputs["x"].requires_grad_()
    for backend in ("reference", "eager"):
        found = linear_distillation(**inputs, ce_weight=1.0, backend=backend)
        (gradient,) = torch.autograd.grad(found.loss, inputs["x"])
        assert found.loss == 0 and not gradient.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_x": torch.zeros(2, 6, 3)}, "teacher_weight: got torch.float64"),
        ({"teacher_weight": torch.zeros(22, 3).double()}, "teacher_weight: got 22 tokens"),
        ({"labels": torch.zeros(2, 7)}, "labels: got torch.float32"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"divergence": "kl"}, "divergence: got 'kl'"),
        ({"chunk_size": 0}, "chunk_size: got 0"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^linear_distillation: {message}"):
        linear_distillation(**(make_inputs() | change))
