"""How two forms of a computation are compared: checked first, then timed in turns.

Both run in one process, A B B A, so that what else happens on the machine meets both alike. What
counts is the ratio: its median, smallest and largest over the rounds. A form that is not right is
not timed.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from megarec_kernels.check import (
    Tensors,
    cotangent,
    first_line,
    outputs_and_gradients,
    rounded,
    worst_error,
)

ROUNDS = 7
"""Rounds of A B B A, at least."""

MAX_LOAD = 1.5
"""The load average of a minute above which what was timed on a CPU does not count. One thread is
timed, which makes a load of 1."""

FLUSH_BYTES = 256 * 2**20
"""More than the second-level cache of a GPU holds; written before each run."""

State = Literal["measured", "wrong", "not installed", "failed"]


@dataclass(frozen=True)
class Form:
    """A way to compute something.

    Attributes:
        name: for the report.
        run: inputs by name -> outputs by name.
        heads_first: it takes and returns (B, H, T, ...) in place of (B, T, H, ...).
        at_least: how many times as long as ours its training pass should take, at least.
    """

    name: str
    run: Callable[..., Tensors]
    heads_first: bool = False
    at_least: float | None = None

    def exchanged(self, tensors: Tensors) -> Tensors:
        """Return tensors from the usual layout in the form's own, or back."""
        if not self.heads_first:
            return tensors
        return {name: x.transpose(1, 2).contiguous() for name, x in tensors.items()}

    def run_usual(self, **inputs: torch.Tensor) -> Tensors:
        """Run on inputs, and return outputs, in the usual layout."""
        return self.exchanged(self.run(**self.exchanged(inputs)))


@dataclass(frozen=True)
class Verdict:
    """Whether a form may be timed, and if not, why."""

    state: State
    reason: str = ""


def judge(form: Form, inputs: Tensors, expected: Tensors, bound: float) -> Verdict:
    """Compare a form's outputs and gradients with the expected ones; see `expected_of`."""
    try:
        actual = outputs_and_gradients(form.run_usual, inputs)
    except ImportError as error:
        return Verdict("not installed", first_line(error))
    except Exception as error:
        # Whatever a form from elsewhere runs into is in the report; the others are measured.
        return Verdict("failed", first_line(error))
    error, name = worst_error(actual, expected)
    if error <= bound:
        return Verdict("measured")
    return Verdict("wrong", f"{name} is off by {error:.1e}, more than {bound:.0e}")


def expected_of(form: Form, inputs: Tensors) -> Tensors:
    """Return outputs and gradients in float64, on the CPU."""
    wide = {name: x.cpu() for name, x in rounded(inputs, torch.float64).items()}
    return outputs_and_gradients(form.run_usual, wide)


def forward(form: Form, inputs: Tensors) -> Callable[[], None]:
    """Return what runs the form, without gradients."""
    native = form.exchanged(inputs)

    @torch.no_grad()
    def run() -> None:
        form.run(**native)

    return run


def forward_backward(form: Form, inputs: Tensors) -> Callable[[], None]:
    """Return what runs the form and computes the gradients of all inputs of a float dtype."""
    leaves = {
        name: x.detach().clone().requires_grad_(x.is_floating_point())
        for name, x in form.exchanged(inputs).items()
    }
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    starts: list[torch.Tensor] = []

    def run() -> None:
        outputs = [x for x in form.run(**leaves).values() if x.requires_grad]
        if not starts:
            starts.extend(cotangent(x) for x in outputs)
        torch.autograd.grad(outputs, wanted, starts, allow_unused=True)

    return run


@dataclass(frozen=True)
class Times:
    """Seconds of a run: by the wall clock (or the device's), and of the processor."""

    wall: float
    processor: float


class Clock:
    """Times a run; on an accelerator by events, with nothing of it in the cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_cpu = device.type == "cpu"
        self.warm_up = 1 if self.on_cpu else 25
        self._flush = (
            None if self.on_cpu else torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        )

    def __call__(self, run: Callable[[], None]) -> Times:
        """Return how long the run takes."""
        if self._flush is None:
            wall, processor = time.perf_counter(), time.process_time()
            run()
            return Times(time.perf_counter() - wall, time.process_time() - processor)
        self._flush.zero_()
        start, end = (torch.Event(self.device, enable_timing=True) for _ in range(2))
        processor = time.process_time()
        start.record()
        run()
        end.record()
        end.synchronize()
        return Times(start.elapsed_time(end) / 1e3, time.process_time() - processor)


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of several numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Sum up."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Comparison:
    """Two forms in turns: seconds of each, and how many times as long the second takes.

    `ratio` is of wall-clock (device) time, `processor_ratio` of processor time; `load` is the
    machine's load average of a minute, the largest seen.
    """

    ours: Spread
    theirs: Spread
    ratio: Spread
    processor_ratio: Spread
    load: float


def compare(
    ours: Callable[[], None], theirs: Callable[[], None], clock: Clock, rounds: int = ROUNDS
) -> Comparison:
    """Run both in turns, A B B A, so many rounds after a warm-up."""
    load = load_average()
    for run in (ours, theirs):
        for _ in range(clock.warm_up):
            run()
    our_times, their_times = [], []
    for _ in range(rounds):
        first, second = clock(ours), clock(theirs)
        third, fourth = clock(theirs), clock(ours)
        our_times.append((first, fourth))
        their_times.append((second, third))
    return summarize(our_times, their_times, max(load, load_average()))


Pair = tuple[Times, Times]


def summarize(ours: Sequence[Pair], theirs: Sequence[Pair], load: float) -> Comparison:
    """Return the ratios of the rounds, each of two runs a form."""

    def ratio(of: Callable[[Times], float]) -> Spread:
        return Spread.of(
            [
                sum(map(of, theirs_)) / max(sum(map(of, ours_)), 1e-9)
                for ours_, theirs_ in zip(ours, theirs, strict=True)
            ]
        )

    return Comparison(
        ours=Spread.of([times.wall for pair in ours for times in pair]),
        theirs=Spread.of([times.wall for pair in theirs for times in pair]),
        ratio=ratio(lambda times: times.wall),
        processor_ratio=ratio(lambda times: times.processor),
        load=load,
    )


def load_average() -> float:
    """Return the load average of the last minute."""
    return os.getloadavg()[0]
