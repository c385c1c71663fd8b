"""Cross-entropy of a linear head, in chunks of tokens: all logits are never held at once."""

import torch
from torch import Tensor

from megarec_kernels.dispatch import choose_backend, triton_problem
from megarec_kernels.linear_cross_entropy.eager import linear_cross_entropy_eager
from megarec_kernels.linear_cross_entropy.gpu import linear_cross_entropy_gpu
from megarec_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from megarec_kernels.linear_cross_entropy.vocabulary import VocabularyPart

__all__ = ["VocabularyPart", "linear_cross_entropy"]

FORMS = {
    "reference": linear_cross_entropy_reference,
    "eager": linear_cross_entropy_eager,
    "gpu": linear_cross_entropy_gpu,
}


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk_size: int = 2048,
    vocabulary: VocabularyPart | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the sum over labels of w (logsumexp(z) - z[label] + z_loss * logsumexp(z)^2).

    Logits z = x W^T are a matmul in x's dtype; all that follows is in promote_types(x.dtype,
    float32). A soft cap c replaces z by c * tanh(z / c). All forms but the reference compute the
    gradients during the forward, so that their backward only scales them.

    Args:
        x: Hidden states, (N, D) or (B, T, D), any float dtype.
        weight: Weight of the head, (V, D), dtype of x.
        labels: int64, (N,) or (B, T). Each must be ``ignore_index`` or in [0, V); others are an
            error that surfaces inside torch (in Triton as a loss of NaN), because a check here
            would wait for the device.
        token_weights: w, (N,) or (B, T), any float dtype; differentiable. None: 1 for all.
        soft_cap: Bound on the logits, > 0; None means none.
        z_loss: Weight of the squared logsumexp, which keeps logits from drifting (2204.02311).
        ignore_index: Label of the tokens that count for nothing. If all do, loss and gradients
            are 0.
        chunk_size: Tokens whose logits are held at once.
        vocabulary: Where ranks divide the vocabulary, this rank's part: ``weight`` has its rows,
            labels are of all, and one that no rank has is no error: its logit counts as 0. Each
            rank returns the whole loss; the gradient of x is what its rows add to it, and has
            yet to be added up over the ranks.
        backend: "auto", "reference" (holds all logits), "eager" or "gpu" (its softmax in Triton);
            MEGAREC_KERNELS overrides it.

    Returns:
        The sum, a scalar in promote_types(x.dtype, float32). Divide it by the number of labels.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    _check(x, weight, labels, token_weights, soft_cap, chunk_size)
    problem = triton_problem(x)
    fastest = "gpu" if x.is_cuda and problem is None else "eager"
    return FORMS[choose_backend("linear_cross_entropy", backend, FORMS, fastest, problem)](
        x.flatten(0, -2),
        weight,
        labels.flatten(),
        None if token_weights is None else token_weights.flatten(),
        soft_cap=soft_cap,
        z_loss=z_loss,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
        vocabulary=vocabulary,
    )


def _check(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    soft_cap: float | None,
    chunk_size: int,
) -> None:
    if x.dim() not in (2, 3):
        _fail("x", f"shape {tuple(x.shape)}", "(N, D) or (B, T, D)")
    if not x.is_floating_point():
        _fail("x", str(x.dtype), "a float dtype")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        _fail("weight", f"shape {tuple(weight.shape)}", f"(V, {x.shape[-1]})")
    if weight.dtype != x.dtype:
        _fail("weight", str(weight.dtype), f"the dtype of x, {x.dtype}")
    if labels.shape != x.shape[:-1] or labels.dtype != torch.int64:
        _fail(
            "labels",
            f"{labels.dtype} {tuple(labels.shape)}",
            f"torch.int64 {tuple(x.shape[:-1])}",
        )
    if token_weights is not None and (
        token_weights.shape != labels.shape or not token_weights.is_floating_point()
    ):
        _fail(
            "token_weights",
            f"{token_weights.dtype} {tuple(token_weights.shape)}",
            f"a float dtype, {tuple(labels.shape)}",
        )
    if soft_cap is not None and not soft_cap > 0:
        _fail("soft_cap", str(soft_cap), "a number > 0, or None")
    if chunk_size < 1:
        _fail("chunk_size", str(chunk_size), "at least 1")


def _fail(argument: str, got: str, expected: str) -> None:
    raise ValueError(f"linear_cross_entropy: {argument}: got {got}, expected {expected}")
