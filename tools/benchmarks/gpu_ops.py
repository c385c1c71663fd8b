"""Small kernels and the loss on a GPU."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from megarec_kernels.causal_conv1d import causal_conv1d
from megarec_kernels.check import Tensors
from megarec_kernels.grouped_norm import grouped_norm
from megarec_kernels.linear_cross_entropy import linear_cross_entropy
from megarec_kernels.rotary import rotary
from megarec_kernels.swiglu import swiglu
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu_forms import CHECKED_TOKENS, Sizes, compiled, drawer, ours_and_others, wide
from benchmarks.protocol import Clock, Form
from benchmarks.race import TRAINING
from benchmarks.report import Result
from megarec.models.rotary import RotaryConfig, rotation

SOFT_CAP = 30.0
EPS = 1e-6


def convolution(sizes: Sizes, clock: Clock) -> Iterator[Result]:
    """The short convolution with SiLU."""

    def inputs(length: int) -> Tensors:
        draw = drawer(sizes, clock.device)
        x = draw(1, length, sizes.width)
        return {"x": x, "weight": draw(sizes.width, 4), "bias": draw(sizes.width)}

    def ours(backend: str, **tensors: Tensor) -> Tensors:
        return {"y": causal_conv1d(**tensors, activation="silu", backend=backend)[0]}

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
        padded = F.pad(x.mT, (weight.shape[1] - 1, 0))
        return {"y": F.silu(F.conv1d(padded, weight[:, None], bias, groups=len(weight))).mT}

    yield from ours_and_others(
        *("conv", f"causal_conv1d, {sizes.tokens} x {sizes.width}", sizes, clock, ours),
        [
            compiled(plain, sizes),
            Form("causal-conv1d", peers.causal_conv1d),
            Form("fla", peers.fla_conv),
        ],
        op="causal_conv1d",
        inputs=inputs(sizes.tokens),
        small=inputs(min(sizes.tokens, CHECKED_TOKENS)),
    )


def pointwise(sizes: Sizes, clock: Clock) -> Iterator[Result]:
    """Norms, with what is fused into them, SwiGLU and rotary positions."""
    yield from _rows(
        *("RMSNorm", "grouped_norm", ("x",), sizes.width, sizes, clock, _rms_norm, _plain_rms_norm),
        Form("liger", functools.partial(peers.liger_rms_norm, EPS)),
        Form("fla", functools.partial(peers.fla_rms_norm, EPS)),
    )
    yield from _rows(
        *("RMSNorm of x * silu(gate)", "grouped_norm", ("x", "gate"), sizes.width, sizes, clock),
        *(_rms_norm, _plain_gated_norm),
    )
    head_dim = sizes.heads[-1][-1]
    yield from _rows(
        *(f"LayerNorm of heads of {head_dim} * sigmoid(gate)", "grouped_norm"),
        *(("x", "output_gate"), sizes.width, sizes, clock),
        *(functools.partial(_head_norm, head_dim), functools.partial(_plain_head_norm, head_dim)),
    )
    yield from _rows(
        *("SwiGLU", "swiglu", ("gate", "up"), sizes.d_ff, sizes, clock, _activation, _plain_swiglu),
        Form("liger", peers.liger_swiglu),
        Form("fla", peers.fla_swiglu),
    )
    yield from _rotary(sizes, clock)


def _rows(
    name: str,
    op: str,
    inputs: Sequence[str],
    width: int,
    sizes: Sizes,
    clock: Clock,
    run: Callable[..., Tensors],
    plain: Callable[..., Tensors],
    *others: Form,
) -> Iterator[Result]:
    """Compare forms of an op on rows of a width, and norms with a weight besides."""

    def make(tokens: int) -> Tensors:
        draw = drawer(sizes, clock.device)
        tensors = {name: draw(tokens, width) for name in inputs}
        return tensors | ({"weight": draw(width)} if op == "grouped_norm" else {})

    tokens = max(1, sizes.tokens // 8)
    yield from ours_and_others(
        *("pointwise", f"{name}, {tokens} x {width}", sizes, clock, run),
        [compiled(plain, sizes), *others],
        op=op,
        inputs=make(tokens),
        small=make(min(tokens, CHECKED_TOKENS)),
    )


def _rotary(sizes: Sizes, clock: Clock) -> Iterator[Result]:
    H, D = sizes.attention

    tokens = max(1, sizes.tokens // 8)
    checked = min(tokens, CHECKED_TOKENS)
    angles = {
        (length, dtype): rotation(
            RotaryConfig(), D, torch.arange(length, device=clock.device), dtype
        )
        for length in (tokens, checked)
        for dtype in (sizes.dtype, torch.float64)
    }

    def turned(backend: str, x: Tensor) -> Tensors:
        return {"y": rotary(x, angles[x.shape[1], x.dtype], backend=backend)}

    def plain(x: Tensor) -> Tensors:
        cos, sin = angles[x.shape[1], x.dtype]
        first, second = x.chunk(2, -1)
        halves = [first * cos - second * sin, second * cos + first * sin]
        return {"y": torch.cat(halves, -1).to(x.dtype)}

    def make(tokens: int) -> Tensors:
        return {"x": drawer(sizes, clock.device)(1, tokens, H, D)}

    yield from ours_and_others(
        *("pointwise", f"rotary, {tokens} x {H} heads {D}", sizes, clock, turned),
        [compiled(plain, sizes)],
        op="rotary",
        inputs=make(tokens),
        small=make(checked),
    )


def _rms_norm(backend: str, **tensors: Tensor) -> Tensors:
    return {"y": grouped_norm(**tensors, eps=EPS, backend=backend)}


def _head_norm(head_dim: int, backend: str, **tensors: Tensor) -> Tensors:
    y = grouped_norm(**tensors, eps=EPS, group_dim=head_dim, center=True, backend=backend)
    return {"y": y}


def _activation(backend: str, **tensors: Tensor) -> Tensors:
    return {"y": swiglu(**tensors, backend=backend)}


def _plain_rms_norm(x: Tensor, weight: Tensor) -> Tensors:
    u = wide(x)
    normed = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + EPS)
    return {"y": normed.to(x.dtype) * weight}


def _plain_gated_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensors:
    y = _plain_rms_norm(wide(x) * F.silu(wide(gate)), weight)["y"]
    return {"y": y.to(x.dtype)}


def _plain_head_norm(head_dim: int, x: Tensor, output_gate: Tensor, weight: Tensor) -> Tensors:
    heads = wide(x).unflatten(-1, (-1, head_dim))
    normed = F.layer_norm(heads, (head_dim,), eps=EPS).flatten(-2).to(x.dtype)
    return {"y": normed * weight * torch.sigmoid(output_gate)}


def _plain_swiglu(gate: Tensor, up: Tensor) -> Tensors:
    return {"y": F.silu(gate) * up}


def loss(sizes: Sizes, clock: Clock) -> Iterator[Result]:
    """Linear, soft cap and cross-entropy: time and memory."""
    N, D, V = sizes.loss

    def inputs(tokens: int) -> Tensors:
        draw = drawer(sizes, clock.device)
        labels = torch.arange(tokens, device=clock.device) * 7919 % V
        return {"x": draw(tokens, D), "weight": D**-0.5 * draw(V, D), "labels": labels}

    def ours(backend: str, **tensors: Tensor) -> Tensors:
        return {"loss": linear_cross_entropy(**tensors, soft_cap=SOFT_CAP, backend=backend)}

    def plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensors:
        logits = SOFT_CAP * torch.tanh(wide(x @ weight.T) / SOFT_CAP)
        return {"loss": F.cross_entropy(logits, labels, reduction="sum")}

    yield from ours_and_others(
        *("loss", f"linear + soft cap + cross-entropy, {N} x {D} x {V}", sizes, clock, ours),
        [
            Form("plain", plain),
            compiled(plain, sizes),
            Form("liger", functools.partial(peers.liger_loss, SOFT_CAP)),
        ],
        op="linear_cross_entropy",
        inputs=inputs(N),
        small=inputs(min(N, CHECKED_TOKENS)),
        passes=TRAINING,
    )
