"""Causal depthwise convolution as K shifted multiply-adds; on CPU faster than torch's conv1d.

The backward is written out; it computes again what enters the activation. Both work in place and
on contiguous rows of weights: fresh memory and strides cost more than arithmetic.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv1d_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    resets: Tensor | None,
    tail: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """Return y and the tail; arguments as in causal_conv1d."""
    B, T, C = x.shape
    K = weight.shape[1]
    tail_BKC = None if tail is None else tail.to(x.dtype)
    visible_BKT1 = None if resets is None else _visible(resets, K, _wide(x))
    y_BTC = _convolve(x, weight, bias, visible_BKT1, tail_BKC, activation == "silu")

    if tail_BKC is None:
        tail_BKC = x.new_zeros(B, K - 1, C)
    last = x[:, max(0, T - (K - 1)) :]
    # A copy, so that whoever keeps the tail does not keep the whole sequence.
    tail_BKC = torch.cat([tail_BKC[:, last.shape[1] :], last], 1)
    if visible_BKT1 is not None:
        tail_BKC = tail_BKC.masked_fill(visible_BKT1[:, 1:, -1] == 0, 0)
    return y_BTC, tail_BKC


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        visible_BKT1: Tensor | None,
        tail: Tensor | None,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, visible_BKT1, tail)
        ctx.silu = silu
        y_BTC = _weigh(*_widen(x, weight, bias, tail), visible_BKT1)
        return (F.silu(y_BTC, inplace=True) if silu else y_BTC).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, visible_BKT1, tail = ctx.saved_tensors
        x_BTC, weight_KC, bias_C, tail_BKC = _widen(x, weight, bias, tail)
        dsum_BTC = dy.to(x_BTC.dtype)
        if ctx.silu:
            sum_BTC = _weigh(x_BTC, weight_KC, bias_C, tail_BKC, visible_BKT1)
            dsum_BTC = torch.ops.aten.silu_backward.grad_input(
                dsum_BTC, sum_BTC, grad_input=sum_BTC
            )

        K = len(weight_KC)
        dx_BTC = dsum_BTC * weight_KC[-1]
        dtail_BKC = None if tail_BKC is None else torch.zeros_like(tail_BKC)
        dweight_KC = torch.empty_like(weight_KC)
        # What tokens add to the weights' gradients. Those that see nothing are first, and fewer
        # from tap to tap: they stay 0.
        buffer_BTC = torch.zeros_like(dx_BTC)
        for k in range(K - 1):
            sources = _sources(x_BTC, tail_BKC, K - 1 - k)
            dsources = _sources(dx_BTC, dtail_BKC, K - 1 - k)
            for (seen, tokens), (dseen, _) in zip(sources, dsources, strict=True):
                dsum, buffer = dsum_BTC[:, tokens], buffer_BTC[:, tokens]
                visible = None if visible_BKT1 is None else visible_BKT1[:, k, tokens]
                dseen.addcmul_(_mask(dsum, visible, buffer), weight_KC[k])
                _mask(torch.mul(dsum, seen, out=buffer), visible, buffer)
            dweight_KC[k] = buffer_BTC.sum((0, 1))
        dweight_KC[-1] = torch.mul(dsum_BTC, x_BTC, out=buffer_BTC).sum((0, 1))
        return (
            dx_BTC.to(x.dtype),
            dweight_KC.T.to(weight.dtype),
            None if bias is None else dsum_BTC.sum((0, 1)).to(bias.dtype),
            None,
            None if dtail_BKC is None else dtail_BKC.to(x.dtype),
            None,
        )


@torch.compiler.allow_in_graph
def _convolve(*args: Any) -> Tensor:
    """Apply it; torch.compile takes it as a whole and traces both of its passes."""
    y: Tensor = _Convolve.apply(*args)
    return y


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _widen(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return all in the dtype of the computation, the weight as (K, C)."""
    dtype = _wide(x)
    return (
        x.to(dtype),
        weight.T.to(dtype).contiguous(),
        None if bias is None else bias.to(dtype),
        None if tail is None else tail.to(dtype),
    )


def _weigh(
    x_BTC: Tensor,
    weight_KC: Tensor,
    bias_C: Tensor | None,
    tail_BKC: Tensor | None,
    visible_BKT1: Tensor | None,
) -> Tensor:
    """Return the weighted sum (B, T, C), in fresh memory."""
    K = len(weight_KC)
    sum_BTC = x_BTC * weight_KC[-1]
    buffer_BTC = torch.empty_like(sum_BTC)  # without masks nothing is written
    for k in range(K - 1):
        for seen, tokens in _sources(x_BTC, tail_BKC, K - 1 - k):
            visible = None if visible_BKT1 is None else visible_BKT1[:, k, tokens]
            seen = _mask(seen, visible, buffer_BTC[:, tokens])
            sum_BTC[:, tokens].addcmul_(seen, weight_KC[k])
    return sum_BTC if bias_C is None else sum_BTC.add_(bias_C)


def _sources(x_BTC: Tensor, tail_BKC: Tensor | None, lag: int) -> list[tuple[Tensor, slice]]:
    """Return what is seen over a lag: views of x and of the tail, and the tokens that see them."""
    T = x_BTC.shape[1]
    sources = [(x_BTC[:, : max(0, T - lag)], slice(lag, T))]
    if tail_BKC is not None:
        start, count = tail_BKC.shape[1] - lag, min(lag, T)
        sources.append((tail_BKC[:, start : start + count], slice(0, count)))
    return sources


def _visible(resets: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """Return (B, K, T, 1), integers of dtype's size: all bits set if tap k is in t's document."""
    document_BS = F.pad(resets, (K - 1, 0)).cumsum(1)
    same_BKT = document_BS.unfold(1, resets.shape[1], 1) == document_BS[:, None, K - 1 :]
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    return -same_BKT[..., None].to(bits)


def _mask(values: Tensor, visible: Tensor | None, buffer: Tensor) -> Tensor:
    """Return values, or in buffer what is visible of them, else 0: exactly, whatever it was.

    By bits, as NaN times 0 is NaN; on CPU five times as fast as masked_fill.
    """
    if visible is None:
        return values
    torch.bitwise_and(values.view(visible.dtype), visible, out=buffer.view(visible.dtype))
    return buffer
