"""The GPU suite: recurrent cells, small kernels and the loss against peers, a slice of xLSTM 7B.

With `SMOKE` the same code runs at tiny sizes, on a CPU.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megarec_kernels.attention import attention
from megarec_kernels.causal_conv1d import causal_conv1d
from megarec_kernels.check import Tensors
from megarec_kernels.gated_linear_attention import gated_linear_attention
from megarec_kernels.linear_cross_entropy import linear_cross_entropy
from torch import Tensor

from benchmarks import peers
from benchmarks.protocol import ROUNDS, Clock, Form
from benchmarks.race import PASSES, TRAINING, Pass, race, timed
from benchmarks.report import Quantity, Result

SOFT_CAP = 30.0
EPS = 1e-6
CHECKED_TOKENS, CHECKED_HEADS = 256, 2
"""Tokens of a row, and heads, on which forms are checked: the reference takes a token at a time."""

GATE = 5e-2
"""The largest error of bfloat16 forms, of a tensor's largest entry: rounding makes up to 1e-2, and
another function is off by its own size."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    dtype: torch.dtype = torch.bfloat16
    rounds: int = ROUNDS
    tokens: int = 65_536
    lengths: tuple[int, ...] = (2048, 8192, 32_768)
    heads: tuple[tuple[int, int, int], ...] = ((16, 128, 256), (8, 256, 512))  # H, Dk, Dv
    ssd: tuple[int, int, int, int] = (128, 64, 128, 8)  # H, P, N, groups
    attention: tuple[int, int] = (32, 128)  # H, D
    width: int = 4096
    d_ff: int = 10_944
    loss: tuple[int, int, int] = (8192, 4096, 50_304)  # tokens, D, V
    matmuls: tuple[tuple[int, int, int], ...] = (
        (8192, 4096, 2048),
        (8192, 4096, 4096),
        (8192, 4096, 10_944),
        (8192, 10_944, 4096),
        (8192, 4096, 50_304),
        (8192, 8192, 8192),
    )
    copied_bytes: int = 4 * 2**30
    compiler: str = "inductor"
    block: tuple[str, ...] = ("model.num_layers=4",)
    block_tokens: int = 8192


SMOKE = Sizes(
    rounds=1,
    tokens=128,
    lengths=(64,),
    heads=((2, 16, 32),),
    ssd=(4, 16, 16, 2),
    attention=(2, 16),
    width=64,
    d_ff=96,
    loss=(64, 32, 96),
    matmuls=((64, 64, 64),),
    copied_bytes=2**16,
    compiler="eager",
    block=(
        *("model.num_layers=1", "model.d_model=64", "model.vocab_size=128"),
        "model.blocks.mlstm.ffn.d_ff=96",
    ),
    block_tokens=64,
)


def cells(sizes: Sizes, clock: Clock) -> Iterator[Result]:
    """The mLSTM of both gates, plain decay and SSD, at each length, as many tokens in all."""
    for length in sizes.lengths:
        for H, Dk, Dv in sizes.heads:
            yield from _linear_cells(sizes, clock, length, H, Dk, Dv)
        yield from _ssd(sizes, clock, length)
        yield from _attention(sizes, clock, length)


def _linear_cells(
    sizes: Sizes, clock: Clock, length: int, heads: int, Dk: int, Dv: int
) -> Iterator[Result]:
    def inputs(rows: int, length: int, H: int) -> Tensors:
        draw = _drawer(sizes, clock.device)
        qk, v = (rows, length, H, Dk), (rows, length, H, Dv)
        gates = {"i": draw(rows, length, H), "f": draw(rows, length, H) + 3}
        return {"q": draw(*qk), "k": draw(*qk), "v": draw(*v), **gates}

    def decays(rows: int, length: int, H: int) -> Tensors:
        tensors = inputs(rows, length, H)
        log_f = F.logsigmoid(tensors["f"].float())
        return {name: tensors[name] for name in "qkv"} | {"log_f": log_f}

    def mlstm(backend: str, i: Tensor, f: Tensor, **qkv: Tensor) -> Tensors:
        gates = {"log_f": _log_sigmoid(f), "log_i": _wide(i)}
        return _linear(backend, **qkv, **gates, gate="exp", normalize=True)

    def siging(backend: str, i: Tensor, f: Tensor, **qkv: Tensor) -> Tensors:
        gates = {"log_f": _log_sigmoid(f), "log_i": _log_sigmoid(i)}
        return _linear(backend, **qkv, **gates, gate="plain")

    def retention(backend: str, **inputs: Tensor) -> Tensors:
        return _linear(backend, **inputs, gate="plain")

    for name, run, make, others in (
        ("mLSTM", mlstm, inputs, [_mlstm(peers.mlstm_xl_chunk, L) for L in (128, 256)]),
        ("mLSTM, sigmoid gate", siging, inputs, [_mlstm(peers.mlstm_siging_xl_chunk, 128)]),
        ("plain decay", retention, decays, [Form("fla simple_gla", peers.fla_simple_gla)]),
    ):
        yield from _ours_and_others(
            *("cells", f"{name}, T {length}, {heads} heads {Dk}/{Dv}", sizes, clock, run, others),
            op="gated_linear_attention",
            inputs=make(max(1, sizes.tokens // length), length, heads),
            small=make(1, min(length, CHECKED_TOKENS), CHECKED_HEADS),
        )


def _mlstm(run: Callable[..., Tensors], chunk_size: int) -> Form:
    name = f"mlstm_kernels xl_chunk, {chunk_size}"
    return Form(name, functools.partial(run, chunk_size), heads_first=True)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _log_sigmoid(x: Tensor) -> Tensor:
    return F.logsigmoid(_wide(x))


def _linear(backend: str, **arguments: object) -> Tensors:
    return {"y": gated_linear_attention(**arguments, backend=backend)[0]}


def _ssd(sizes: Sizes, clock: Clock, length: int) -> Iterator[Result]:
    heads, P, N, groups = sizes.ssd

    def inputs(rows: int, length: int, H: int, G: int) -> Tensors:
        draw = _drawer(sizes, clock.device)
        bc = (rows, length, G, N)
        dt = F.softplus(draw(rows, length, H).float() - 4)
        A = -torch.linspace(1, 16, H, device=clock.device)
        return {"x": draw(rows, length, H, P), "dt": dt, "A": A, "B": draw(*bc), "C": draw(*bc)}

    def ours(backend: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensors:
        gates = {"log_f": dt * A, "log_i": dt.log()}
        return _linear(backend, q=C, k=B, v=x, **gates, scale=1.0, gate="plain")

    case = f"SSD, T {length}, {heads} heads {N}/{P}, {groups} groups"
    yield from _ours_and_others(
        *("cells", case, sizes, clock, ours),
        [Form("mamba-ssm", functools.partial(peers.mamba_ssd, 256))],
        op="gated_linear_attention",
        inputs=inputs(max(1, sizes.tokens // length), length, heads, groups),
        small=inputs(1, min(length, CHECKED_TOKENS), 2 * CHECKED_HEADS, CHECKED_HEADS),
    )


def _attention(sizes: Sizes, clock: Clock, length: int) -> Iterator[Result]:
    """Yield what causal softmax attention takes for as many tokens: another function, for scale."""
    H, D = sizes.attention

    def inputs(rows: int, length: int) -> Tensors:
        draw = _drawer(sizes, clock.device)
        return {name: draw(rows, length, H, D) for name in "qkv"}

    def ours(backend: str, **qkv: Tensor) -> Tensors:
        return {"y": attention(**qkv, backend=backend)}

    yield from _compare_all(
        *("cells", f"softmax attention, T {length}, {H} heads {D}", sizes, clock),
        Form("reference", functools.partial(ours, "reference")),
        [Form("torch sdpa", peers.sdpa, heads_first=True)],
        [Form("flash-attn", peers.flash_attention)],
        inputs=inputs(max(1, sizes.tokens // length), length),
        small=inputs(1, min(length, CHECKED_TOKENS)),
    )


def convolution(sizes: Sizes, clock: Clock) -> Iterator[Result]:
    """The short convolution with SiLU."""

    def inputs(length: int) -> Tensors:
        draw = _drawer(sizes, clock.device)
        x = draw(1, length, sizes.width)
        return {"x": x, "weight": draw(sizes.width, 4), "bias": draw(sizes.width)}

    def ours(backend: str, **tensors: Tensor) -> Tensors:
        return {"y": causal_conv1d(**tensors, activation="silu", backend=backend)[0]}

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
        padded = F.pad(x.mT, (weight.shape[1] - 1, 0))
        return {"y": F.silu(F.conv1d(padded, weight[:, None], bias, groups=len(weight))).mT}

    yield from _ours_and_others(
        *("conv", f"causal_conv1d, {sizes.tokens} x {sizes.width}", sizes, clock, ours),
        [
            _compiled(plain, sizes),
            Form("causal-conv1d", peers.causal_conv1d),
            Form("fla", peers.fla_conv),
        ],
        op="causal_conv1d",
        inputs=inputs(sizes.tokens),
        small=inputs(min(sizes.tokens, CHECKED_TOKENS)),
    )


def pointwise(sizes: Sizes, clock: Clock) -> Iterator[Result]:
    """Norms and activations: ours are what the models use."""
    from megarec.models.norm import GatedGroupRMSNorm, RMSNorm

    def called(module: torch.nn.Module) -> Callable[..., Tensors]:
        def run(weight: Tensor, **inputs: Tensor) -> Tensors:
            return {"y": torch.func.functional_call(module, {"weight": weight}, (), inputs)}

        return run

    def plain_norm(x: Tensor, weight: Tensor) -> Tensors:
        wide = _wide(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        return {"y": normed.to(x.dtype) * weight}

    def plain_gated(x: Tensor, gate: Tensor, weight: Tensor) -> Tensors:
        wide = _wide(x) * F.silu(_wide(gate))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        return {"y": normed.to(x.dtype) * weight}

    def plain_swiglu(gate: Tensor, up: Tensor) -> Tensors:
        return {"y": F.silu(gate) * up}

    def rows(names: str, width: int, tokens: int, *, weighted: bool) -> Tensors:
        draw = _drawer(sizes, clock.device)
        tensors = {name: draw(tokens, width) for name in names.split()}
        return tensors | ({"weight": draw(width)} if weighted else {})

    norms: list[tuple[str, str, int, Callable[..., Tensors], Sequence[Form]]] = [
        (
            *("RMSNorm", "x", sizes.width, called(RMSNorm(sizes.width, EPS))),
            [
                _compiled(plain_norm, sizes),
                Form("liger", functools.partial(peers.liger_rms_norm, EPS)),
                Form("fla", functools.partial(peers.fla_rms_norm, EPS)),
            ],
        ),
        (
            "RMSNorm of x * silu(gate)",
            "x gate",
            sizes.width,
            called(GatedGroupRMSNorm(sizes.width, sizes.width, EPS)),
            [_compiled(plain_gated, sizes)],
        ),
        (
            *("SwiGLU", "gate up", sizes.d_ff, plain_swiglu),
            [
                _compiled(plain_swiglu, sizes),
                Form("liger", peers.liger_swiglu),
                Form("fla", peers.fla_swiglu),
            ],
        ),
    ]
    tokens = max(1, sizes.tokens // 8)
    for name, inputs, width, run, others in norms:
        weighted = name != "SwiGLU"
        yield from _compare_all(
            *("pointwise", f"{name}, {tokens} x {width}", sizes, clock),
            *(Form("reference", run), [Form("megarec", run)], others),
            inputs=rows(inputs, width, tokens, weighted=weighted),
            small=rows(inputs, width, min(tokens, CHECKED_TOKENS), weighted=weighted),
        )


def loss(sizes: Sizes, clock: Clock) -> Iterator[Result]:
    """Linear, soft cap and cross-entropy: time and memory."""
    N, D, V = sizes.loss

    def inputs(tokens: int) -> Tensors:
        draw = _drawer(sizes, clock.device)
        labels = torch.arange(tokens, device=clock.device) * 7919 % V
        return {"x": draw(tokens, D), "weight": D**-0.5 * draw(V, D), "labels": labels}

    def ours(backend: str, **tensors: Tensor) -> Tensors:
        return {"loss": linear_cross_entropy(**tensors, soft_cap=SOFT_CAP, backend=backend)}

    def plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensors:
        logits = SOFT_CAP * torch.tanh(_wide(x @ weight.T) / SOFT_CAP)
        return {"loss": F.cross_entropy(logits, labels, reduction="sum")}

    yield from _ours_and_others(
        *("loss", f"linear + soft cap + cross-entropy, {N} x {D} x {V}", sizes, clock, ours),
        [
            Form("plain", plain),
            _compiled(plain, sizes),
            Form("liger", functools.partial(peers.liger_loss, SOFT_CAP)),
        ],
        op="linear_cross_entropy",
        inputs=inputs(N),
        small=inputs(min(N, CHECKED_TOKENS)),
        passes=TRAINING,
    )


def calibration(sizes: Sizes, clock: Clock) -> Iterator[Result]:
    """What the device does at best: matmuls, and copies (bytes read and written)."""
    draw = _drawer(sizes, clock.device)
    for M, K, N in sizes.matmuls:
        a, b = draw(M, K), draw(N, K)
        seconds = timed(lambda a=a, b=b: F.linear(a, b), clock, sizes.rounds).median
        rate = 2 * M * K * N / seconds / 1e12
        yield Quantity("calibration", f"matmul {M} x {K} x {N}", rate, "TFLOP/s")
    source = torch.empty(sizes.copied_bytes, dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), clock, sizes.rounds).median
    yield Quantity("calibration", "copy", 2 * sizes.copied_bytes / seconds / 1e9, "GB/s")


def block(sizes: Sizes, clock: Clock) -> Iterator[Result]:
    """A training step of a slice of xLSTM 7B."""
    from benchmarks.block import block_slice

    return block_slice(sizes, clock)


Part = Callable[[Sizes, Clock], Iterator[Result]]

PARTS: dict[str, Part] = {
    "calibration": calibration,
    "cells": cells,
    "conv": convolution,
    "pointwise": pointwise,
    "loss": loss,
    "block": block,
}


def _ours_and_others(
    part: str,
    case: str,
    sizes: Sizes,
    clock: Clock,
    run: Callable[..., Tensors],
    others: Sequence[Form],
    *,
    op: str,
    inputs: Tensors,
    small: Tensors,
    passes: Mapping[str, Pass] = PASSES,
) -> Iterator[Result]:
    """Compare our op's fastest form with its others and with those of others.

    `run` takes the backend first.
    """
    names = list(importlib.import_module(f"megarec_kernels.{op}").FORMS)
    # The last is the fastest. Without a GPU there is no form for GPUs to be blamed.
    fast = [n for n in names[::-1] if n != "reference" and not (n == "gpu" and clock.on_cpu)]
    yield from _compare_all(
        *(part, case, sizes, clock, Form("reference", functools.partial(run, "reference"))),
        *([Form(f"megarec {n}", functools.partial(run, n)) for n in fast], others),
        inputs=inputs,
        small=small,
        passes=passes,
    )


def _compare_all(
    part: str,
    case: str,
    sizes: Sizes,
    clock: Clock,
    reference: Form,
    ours: Sequence[Form],
    others: Sequence[Form],
    *,
    inputs: Tensors,
    small: Tensors,
    passes: Mapping[str, Pass] = PASSES,
) -> Iterator[Result]:
    """Time the first of ours by itself, and in turns with all other forms."""
    yield from race(
        part,
        case,
        reference=reference,
        ours=ours[0],
        others=[(form, None) for form in (*ours[1:], *others)],
        inputs=inputs,
        small=small,
        bound=GATE,
        clock=clock,
        rounds=sizes.rounds,
        passes=passes,
        alone=True,
    )


def _compiled(plain: Callable[..., Tensors], sizes: Sizes) -> Form:
    compiled = torch.compile(plain, backend=sizes.compiler, dynamic=False)
    return Form("torch.compile", compiled)


def _drawer(sizes: Sizes, device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=sizes.dtype)

    return draw
