"""Recurrent cells on a GPU, at each length as many tokens in all; and attention, for scale."""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from megarec_kernels.attention import attention
from megarec_kernels.check import Tensors
from megarec_kernels.gated_linear_attention import gated_linear_attention
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu_forms import (
    CHECKED_HEADS,
    CHECKED_TOKENS,
    CHUNK,
    Sizes,
    compare_all,
    drawer,
    ours_and_others,
    wide,
)
from benchmarks.protocol import Clock, Form
from benchmarks.report import Result

OTHER_CHUNKS = (128, 512)


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
        draw = drawer(sizes, clock.device)
        qk, v = (rows, length, H, Dk), (rows, length, H, Dv)
        gates = {"i": draw(rows, length, H), "f": draw(rows, length, H) + 3}
        return {"q": draw(*qk), "k": draw(*qk), "v": draw(*v), **gates}

    def decays(rows: int, length: int, H: int) -> Tensors:
        tensors = inputs(rows, length, H)
        log_f = F.logsigmoid(tensors["f"].float())
        return {name: tensors[name] for name in "qkv"} | {"log_f": log_f}

    def mlstm(
        backend: str, i: Tensor, f: Tensor, chunk_size: int = CHUNK, **qkv: Tensor
    ) -> Tensors:
        gates = {"log_f": _log_sigmoid(f), "log_i": wide(i)}
        options = {"gate": "exp", "normalize": True, "chunk_size": chunk_size}
        return _linear(backend, **qkv, **gates, **options)

    def siging(backend: str, i: Tensor, f: Tensor, **qkv: Tensor) -> Tensors:
        gates = {"log_f": _log_sigmoid(f), "log_i": _log_sigmoid(i)}
        return _linear(backend, **qkv, **gates, gate="plain")

    def retention(backend: str, **inputs: Tensor) -> Tensors:
        return _linear(backend, **inputs, gate="plain")

    own_chunks = [
        Form(f"megarec, chunks of {L}", functools.partial(mlstm, "auto", chunk_size=L))
        for L in OTHER_CHUNKS
    ]
    aim = 1.2 if sizes.aimed_at else None
    at_most_ms = 12.8 if sizes.aimed_at else None

    def peer(run: Callable[..., Tensors], chunk_size: int) -> Form:
        name = f"mlstm_kernels xl_chunk, {chunk_size}"
        return Form(name, functools.partial(run, chunk_size), heads_first=True, at_least=aim)

    peer_chunks = [peer(peers.mlstm_xl_chunk, L) for L in (128, 256)]
    simple_gla = Form("fla simple_gla", peers.fla_simple_gla, at_least=aim)
    for name, run, make, others in (
        ("mLSTM", mlstm, inputs, own_chunks + peer_chunks),
        ("mLSTM, sigmoid gate", siging, inputs, [peer(peers.mlstm_siging_xl_chunk, 128)]),
        ("plain decay", retention, decays, [simple_gla]),
    ):
        yield from ours_and_others(
            *("cells", f"{name}, T {length}, {heads} heads {Dk}/{Dv}", sizes, clock, run, others),
            op="gated_linear_attention",
            inputs=make(max(1, sizes.tokens // length), length, heads),
            small=make(1, min(length, CHECKED_TOKENS), CHECKED_HEADS),
            at_most_ms=at_most_ms,
        )


def _log_sigmoid(x: Tensor) -> Tensor:
    return F.logsigmoid(wide(x))


def _linear(backend: str, chunk_size: int = CHUNK, **arguments: object) -> Tensors:
    y, _, _ = gated_linear_attention(**arguments, chunk_size=chunk_size, backend=backend)
    return {"y": y}


def _ssd(sizes: Sizes, clock: Clock, length: int) -> Iterator[Result]:
    heads, P, N, groups = sizes.ssd

    def inputs(rows: int, length: int, H: int, G: int) -> Tensors:
        draw = drawer(sizes, clock.device)
        bc = (rows, length, G, N)
        dt = F.softplus(draw(rows, length, H).float() - 4)
        A = -torch.linspace(1, 16, H, device=clock.device)
        return {"x": draw(rows, length, H, P), "dt": dt, "A": A, "B": draw(*bc), "C": draw(*bc)}

    def ours(backend: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensors:
        gates = {"log_f": dt * A, "log_i": dt.log()}
        return _linear(backend, q=C, k=B, v=x, **gates, scale=1.0, gate="plain")

    aim = 3.0 if sizes.aimed_at else None
    case = f"SSD, T {length}, {heads} heads {N}/{P}, {groups} groups"
    yield from ours_and_others(
        *("cells", case, sizes, clock, ours),
        [Form("mamba-ssm", functools.partial(peers.mamba_ssd, 256), at_least=aim)],
        op="gated_linear_attention",
        inputs=inputs(max(1, sizes.tokens // length), length, heads, groups),
        small=inputs(1, min(length, CHECKED_TOKENS), 2 * CHECKED_HEADS, CHECKED_HEADS),
    )


def _attention(sizes: Sizes, clock: Clock, length: int) -> Iterator[Result]:
    """Yield what causal softmax attention takes for as many tokens: another function, for scale."""
    H, D = sizes.attention

    def inputs(rows: int, length: int) -> Tensors:
        draw = drawer(sizes, clock.device)
        return {name: draw(rows, length, H, D) for name in "qkv"}

    def ours(backend: str, **qkv: Tensor) -> Tensors:
        return {"y": attention(**qkv, backend=backend)}

    yield from compare_all(
        *("cells", f"softmax attention, T {length}, {H} heads {D}", sizes, clock),
        Form("reference", functools.partial(ours, "reference")),
        [Form("torch sdpa", peers.sdpa, heads_first=True)],
        [Form("flash-attn", peers.flash_attention)],
        inputs=inputs(max(1, sizes.tokens // length), length),
        small=inputs(1, min(length, CHECKED_TOKENS)),
    )
