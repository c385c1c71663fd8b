"""The CPU suite: ops against slow and plain forms, models against transformers, and the rest."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megarec_kernels.check import Tensors
from megarec_kernels.gated_linear_attention import gated_linear_attention
from megarec_kernels.newton_rnn import Cell, ParaGRUCell, ParaLSTMCell, newton_rnn

from benchmarks.models import training_steps
from benchmarks.plain_forms import chunkwise, quadratic
from benchmarks.protocol import ROUNDS, Clock, Form, compare, cotangent, forward_backward
from benchmarks.race import race
from benchmarks.report import Result, Row
from benchmarks.running import checkpoints, loader, trainer_overhead

CHUNK = 64
GATE = 2e-4
"""The largest error, of a tensor's largest entry: a difference of float32 sums over 2,048 tokens
may round by half of it, and another function is off by its own size."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured: the real thing, or a trial of the same code."""

    rounds: int = ROUNDS
    linear_attention: tuple[int, int, int, int] = (1, 2048, 4, 64)  # B, T, H, D
    newton: tuple[int, int, int] = (4, 1024, 256)  # B, T, D
    small: bool = False


SMOKE = Sizes(rounds=1, linear_attention=(1, 128, 2, 8), newton=(2, 32, 8), small=True)


def gated_attention(sizes: Sizes, clock: Clock) -> Iterator[Result]:
    """Our chunkwise form against the sequential, the quadratic and a plain chunkwise one.

    The sequential form takes seconds: its time is measured once, with plain gates.
    """
    B, T, H, D = sizes.linear_attention
    draw = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(B, T, H, D, generator=draw) for name in "qkv"}
    inputs["log_f"] = F.logsigmoid(torch.randn(B, T, H, generator=draw) + 3)
    inputs["log_i"] = torch.randn(B, T, H, generator=draw)
    for mode, normalize in (("plain gates", False), ("mLSTM", True)):

        def own(backend: str, normalize: bool = normalize) -> Callable[..., Tensors]:
            gate = "exp" if normalize else "plain"

            def run(**inputs: torch.Tensor) -> Tensors:
                y, _, _ = gated_linear_attention(
                    **inputs, gate=gate, normalize=normalize, chunk_size=CHUNK, backend=backend
                )
                return {"y": y}

            return run

        def plain_chunks(normalize: bool = normalize, **inputs: torch.Tensor) -> Tensors:
            return {"y": chunkwise(**inputs, normalize=normalize, chunk_size=CHUNK)}

        def all_pairs(normalize: bool = normalize, **inputs: torch.Tensor) -> Tensors:
            return {"y": quadratic(**inputs, normalize=normalize)}

        sequential = Form("sequential", own("reference"), at_least=None if sizes.small else 40)
        yield from race(
            "gated linear attention",
            f"{mode}, B{B} T{T} H{H} D{D}",
            reference=sequential,
            ours=Form("eager, chunks of 64", own("eager")),
            others=[
                *([sequential] if mode == "plain gates" else []),
                Form("quadratic", all_pairs, at_least=None if sizes.small else 15),
                Form("chunks by autograd", plain_chunks),
            ],
            inputs=inputs,
            bound=GATE,
            clock=clock,
            rounds=sizes.rounds,
        )


def newton(sizes: Sizes, clock: Clock) -> Iterator[Result]:
    """Newton's method against loops over time, and torch's dense recurrences beside it."""
    B, T, D = sizes.newton
    part, case = "newton_rnn", f"B{B} T{T} D{D}"
    draw = torch.Generator().manual_seed(0)
    cells: dict[str, Cell] = {"ParaGRU": ParaGRUCell(), "ParaLSTM": ParaLSTMCell()}
    for name, cell in cells.items():
        inputs = {"u": torch.randn(B, T, cell.num_inputs, D, generator=draw)}
        for key, rows in cell.recurrent.items():
            inputs[key] = torch.rand(rows, D, generator=draw) - 0.5

        def own(backend: str, cell: Cell = cell) -> Callable[..., Tensors]:
            def run(u: torch.Tensor, **params: torch.Tensor) -> Tensors:
                return {"h": newton_rnn(cell, u, params, backend=backend)[0]}

            return run

        def plain(u: torch.Tensor, cell: Cell = cell, **params: torch.Tensor) -> Tensors:
            # As one writes it; the walk of ours takes u apart first, which autograd likes better.
            h = u.new_zeros(B, cell.num_slots, D)
            states = []
            for t in range(T):
                h = cell.step(h, u[:, t], params)
                states.append(h)
            return {"h": torch.stack(states, 1)}

        loop = Form("loop over time", plain, at_least=None if sizes.small else 8)
        walk = Form("our walk over time", own("reference"))
        ours = Form("Newton", own("eager"))
        yield from race(
            part,
            f"{name}, {case}",
            reference=walk,
            ours=ours,
            others=[*([loop] if name == "ParaGRU" else []), walk],
            inputs=inputs,
            bound=1e-3,  # the solver's tolerance
            clock=clock,
            rounds=sizes.rounds,
        )
        if name != "ParaGRU":
            continue
        for kind in (torch.nn.GRU, torch.nn.LSTM):
            yield Row(
                part,
                f"{name}, {case}, fwd+bwd",
                ours.name,
                f"nn.{kind.__name__}",
                reason="another function: dense, with its matmuls",
                comparison=compare(
                    forward_backward(ours, inputs), _dense(kind, B, T, D), clock, sizes.rounds
                ),
            )


def _dense(kind: type[torch.nn.RNNBase], B: int, T: int, D: int) -> Callable[[], None]:
    """Return the forward and backward pass of one of torch's recurrent layers."""
    module = kind(D, D, batch_first=True)
    x = torch.randn(B, T, D, requires_grad=True)
    leaves, start = [x, *module.parameters()], cotangent(x)

    def run() -> None:
        torch.autograd.grad(module(x)[0], leaves, start)

    return run


Part = Callable[[Sizes, Clock], Iterator[Result]]

PARTS: dict[str, Part] = {
    "attention": gated_attention,
    "newton": newton,
    "models": lambda sizes, clock: training_steps(clock, sizes.rounds, small=sizes.small),
    "trainer": lambda sizes, clock: trainer_overhead(clock, sizes.rounds, small=sizes.small),
    "loader": lambda sizes, clock: loader(sizes.rounds, small=sizes.small),
    "checkpoint": lambda sizes, clock: checkpoints(sizes.rounds, small=sizes.small),
}
