"""What the parts of the GPU suite share: sizes, and how our forms meet those of others."""

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from megarec_kernels.check import Tensors
from torch import Tensor

from benchmarks.protocol import ROUNDS, Clock, Form
from benchmarks.race import PASSES, Pass, race
from benchmarks.report import Result

CHUNK = 256
"""Tokens of a chunk: of fewer more states are written, of more there is more work inside."""

CHECKED_TOKENS, CHECKED_HEADS = 256, 2
"""Tokens of a row, and heads, on which forms are checked: the reference takes a token at a time."""

GATE = 5e-2
"""The largest error of bfloat16 forms, of a tensor's largest entry: rounding makes up to 1e-2, and
another function is off by its own size."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    dtype: torch.dtype = torch.bfloat16
    aimed_at: bool = True  # targets are of these sizes
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
    block: tuple[str, ...] = (
        "model.num_layers=4",
        f"model.blocks.mlstm.mixer.chunk_size={CHUNK}",
    )
    block_tokens: int = 8192


SMOKE = Sizes(
    aimed_at=False,
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


def ours_and_others(
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
    at_most_ms: float | None = None,
) -> Iterator[Result]:
    """Compare our op's fastest form with its others and with those of others.

    `run` takes the backend first.
    """
    names = list(importlib.import_module(f"megarec_kernels.{op}").FORMS)
    # The last is the fastest. Without a GPU there is no form for GPUs to be blamed.
    fast = [n for n in names[::-1] if n != "reference" and not (n == "gpu" and clock.on_cpu)]
    yield from compare_all(
        *(part, case, sizes, clock, Form("reference", functools.partial(run, "reference"))),
        *([Form(f"megarec {n}", functools.partial(run, n)) for n in fast], others),
        inputs=inputs,
        small=small,
        passes=passes,
        at_most_ms=at_most_ms,
    )


def compare_all(
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
    at_most_ms: float | None = None,
) -> Iterator[Result]:
    """Time the first of ours by itself, and in turns with all other forms."""
    yield from race(
        part,
        case,
        reference=reference,
        ours=ours[0],
        others=(*ours[1:], *others),
        inputs=inputs,
        small=small,
        bound=GATE,
        clock=clock,
        rounds=sizes.rounds,
        passes=passes,
        alone=True,
        at_most_ms=at_most_ms,
    )


def compiled(plain: Callable[..., Tensors], sizes: Sizes) -> Form:
    """Return what torch.compile makes of plain code."""
    return Form("torch.compile", torch.compile(plain, backend=sizes.compiler, dynamic=False))


def drawer(sizes: Sizes, device: torch.device) -> Callable[..., Tensor]:
    """Return what draws normal tensors of a shape, the same in each case."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=sizes.dtype)

    return draw


def wide(x: Tensor) -> Tensor:
    """Return x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
