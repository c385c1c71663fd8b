"""Causal softmax attention with grouped heads, document resets, a window and a cache of keys."""

import torch
from torch import Tensor

from megarec_kernels.attention.eager import attention_eager
from megarec_kernels.attention.gpu import attention_gpu, flex_fits
from megarec_kernels.attention.reference import attention_reference
from megarec_kernels.dispatch import choose_backend

__all__ = ["attention"]

FORMS = {"reference": attention_reference, "eager": attention_eager, "gpu": attention_gpu}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    resets: Tensor | None = None,
    num_cached: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return y_t = sum_s softmax_s(scale * q_t k_s) v_s over the keys that token t may see.

    The first S - T keys are a cache of the tokens before. A token sees itself, the tokens of its
    own document before it, and, as long as no document has started, the cached ones that count.

    Args:
        q: Queries, (B, T, H, Dk), any float dtype.
        k: Keys, (B, S, G, Dk), S >= T. G divides H: each serves H / G consecutive query heads.
        v: Values, (B, S, G, Dv).
        resets: (B, T) bool, True where a document starts: nothing before it is seen, exactly.
        num_cached: (B,) int64, how many of the cached keys count: the last ones of a row; None
            means all of them.
        window: Number of tokens that a token sees at most, itself included; None means all.
        scale: Factor on the scores; None means Dk ** -0.5.
        backend: "auto", "reference", "eager" (torch's scaled_dot_product_attention) or "gpu"
            (torch's flex_attention, compiled); MEGAREC_KERNELS overrides it. "auto" takes flex on
            a GPU where documents or a window make a mask, which flash kernels do not take.

    Returns:
        y (B, T, H, Dv) in v's dtype; the softmax is computed in float32 at least.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    _check(q, k, v, resets, num_cached, window)
    masked = resets is not None or window is not None or num_cached is not None
    fastest = "gpu" if q.is_cuda and masked and flex_fits(q, v) else "eager"
    form = FORMS[choose_backend("attention", backend, FORMS, fastest)]
    return form(
        q, k, v, resets, num_cached, window, q.shape[-1] ** -0.5 if scale is None else scale
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    resets: Tensor | None,
    num_cached: Tensor | None,
    window: int | None,
) -> None:
    if q.dim() != 4 or q.shape[1] == 0:
        _fail("q", f"shape {tuple(q.shape)}", "(B, T, H, Dk) with at least one token")
    if not q.is_floating_point():
        _fail("q", str(q.dtype), "a float dtype")
    B, T, H, Dk = q.shape
    if k.dim() != 4 or k.shape[0] != B or k.shape[1] < T or k.shape[3] != Dk:
        _fail("k", f"shape {tuple(k.shape)}", f"({B}, S, G, {Dk}) with S at least {T}")
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        _fail("v", f"shape {tuple(v.shape)}", f"({', '.join(map(str, k.shape[:3]))}, Dv)")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            _fail(name, str(x.dtype), f"the dtype of q, {q.dtype}")
    if H % k.shape[2]:
        _fail("k", f"{k.shape[2]} heads", f"a number that divides the {H} heads of q")
    if resets is not None and (resets.shape != (B, T) or resets.dtype != torch.bool):
        _fail("resets", f"{resets.dtype} {tuple(resets.shape)}", f"torch.bool {(B, T)}")
    if num_cached is not None and (num_cached.shape != (B,) or num_cached.dtype != torch.int64):
        _fail("num_cached", f"{num_cached.dtype} {tuple(num_cached.shape)}", f"torch.int64 {(B,)}")
    if window is not None and window < 1:
        _fail("window", str(window), "at least 1, or None")


def _fail(argument: str, got: str, expected: str) -> None:
    raise ValueError(f"attention: {argument}: got {got}, expected {expected}")
