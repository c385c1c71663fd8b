"""Distillation loss of two linear heads, in chunks of tokens: all logits are never held at once."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megarec_kernels.dispatch import choose_backend
from megarec_kernels.linear_distillation.eager import linear_distillation_eager
from megarec_kernels.linear_distillation.reference import linear_distillation_reference

__all__ = ["DistillationLoss", "linear_distillation"]

FORMS = {"reference": linear_distillation_reference, "eager": linear_distillation_eager}


class DistillationLoss(NamedTuple):
    """Sums over the tokens with labels, scalars in float32 at least; only `loss` has a gradient."""

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor


def linear_distillation(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    divergence: Literal["forward_kl", "reverse_kl"] = "reverse_kl",
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk_size: int = 2048,
    backend: str = "auto",
) -> DistillationLoss:
    """Return kl_weight * t^2 * divergence + ce_weight * cross-entropy, summed over the tokens.

    With q = softmax(z / t) of the student's logits z and p = softmax(z' / t) of the teacher's, the
    divergence is KL(p || q) (forward: the student covers what the teacher does; arXiv 1503.02531,
    section 2) or KL(q || p) (reverse: the student keeps to what the teacher finds likely; arXiv
    2306.08543, section 2.1). t^2 keeps the gradient's size whatever the temperature t. The
    cross-entropy is that of linear_cross_entropy, z-loss included, at temperature 1.

    Args:
        x: Hidden states of the student, (N, D) or (B, T, D), any float dtype.
        weight: Weight of its head, (V, D), dtype of x.
        teacher_x: Hidden states of the teacher, (N, E) or (B, T, E); it gets no gradient.
        teacher_weight: Weight of its head, (V, E), dtype of teacher_x.
        labels: int64, (N,) or (B, T); tokens with `ignore_index` count for nothing.
        divergence: "forward_kl" or "reverse_kl".
        temperature: t > 0, for both.
        kl_weight: Factor on the divergence.
        ce_weight: Factor on the cross-entropy.
        soft_cap: Bound on the student's logits; None means none.
        teacher_soft_cap: Bound on the teacher's.
        z_loss: Weight of the squared logsumexp, part of the cross-entropy.
        ignore_index: Label of the tokens that count for nothing.
        chunk_size: Tokens whose logits are held at once.
        backend: "auto", "reference" (holds all logits) or "eager"; MEGAREC_KERNELS overrides it.

    Returns:
        The loss, and its two terms as they are without weights and t^2, for the log.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    _check(x, weight, teacher_x, teacher_weight, labels, divergence, temperature, chunk_size)
    sums = FORMS[choose_backend("linear_distillation", backend)](
        x.flatten(0, -2),
        weight,
        teacher_x.detach().flatten(0, -2),
        teacher_weight.detach(),
        labels.flatten(),
        reverse=divergence == "reverse_kl",
        temperature=temperature,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        soft_cap=soft_cap,
        teacher_soft_cap=teacher_soft_cap,
        z_loss=z_loss,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
    )
    return DistillationLoss(*sums)


def _check(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    divergence: str,
    temperature: float,
    chunk_size: int,
) -> None:
    for prefix, hidden, head in (("", x, weight), ("teacher_", teacher_x, teacher_weight)):
        if hidden.dim() not in (2, 3) or not hidden.is_floating_point():
            _fail(
                f"{prefix}x", f"{hidden.dtype} {tuple(hidden.shape)}", "floats (N, D) or (B, T, D)"
            )
        if head.dim() != 2 or head.shape[1] != hidden.shape[-1] or head.dtype != hidden.dtype:
            expected = f"{hidden.dtype} (V, {hidden.shape[-1]})"
            _fail(f"{prefix}weight", f"{head.dtype} {tuple(head.shape)}", expected)
    if teacher_x.shape[:-1] != x.shape[:-1]:
        _fail("teacher_x", f"tokens {tuple(teacher_x.shape[:-1])}", f"{tuple(x.shape[:-1])} as x")
    if teacher_weight.shape[0] != weight.shape[0]:
        _fail("teacher_weight", f"{teacher_weight.shape[0]} tokens", f"{weight.shape[0]} as weight")
    if labels.shape != x.shape[:-1] or labels.dtype != torch.int64:
        expected = f"torch.int64 {tuple(x.shape[:-1])}"
        _fail("labels", f"{labels.dtype} {tuple(labels.shape)}", expected)
    if divergence not in ("forward_kl", "reverse_kl"):
        _fail("divergence", repr(divergence), "'forward_kl' or 'reverse_kl'")
    if not temperature > 0:
        _fail("temperature", str(temperature), "a number > 0")
    if chunk_size < 1:
        _fail("chunk_size", str(chunk_size), "at least 1")


def _fail(argument: str, got: str, expected: str) -> None:
    raise ValueError(f"linear_distillation: {argument}: got {got}, expected {expected}")
