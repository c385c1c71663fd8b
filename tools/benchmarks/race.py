"""Our form of a computation against others, each checked before it is timed."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from megarec_kernels.check import Tensors, first_line

from benchmarks.protocol import (
    ROUNDS,
    Clock,
    Form,
    Spread,
    compare,
    expected_of,
    forward,
    forward_backward,
    judge,
)
from benchmarks.report import Quantity, Result, Row

Pass = Callable[[Form, Tensors], Callable[[], None]]
PASSES: Mapping[str, Pass] = {"fwd": forward, "fwd+bwd": forward_backward}
TRAINING: Mapping[str, Pass] = {"fwd+bwd": forward_backward}


def race(
    part: str,
    case: str,
    *,
    reference: Form,
    ours: Form,
    others: Sequence[Form],
    inputs: Tensors,
    small: Tensors | None = None,
    bound: float,
    clock: Clock,
    rounds: int = ROUNDS,
    passes: Mapping[str, Pass] = TRAINING,
    alone: bool = False,
    at_most_ms: float | None = None,
) -> Iterator[Result]:
    """Yield a row for each other form and pass.

    Args:
        part: of the suite.
        case: what is computed.
        reference: gives outputs and gradients in float64, slowly.
        ours: our form.
        others: forms of the same function.
        inputs: of what is timed.
        small: of what is checked, where the reference cannot have all; None: the same.
        bound: the largest error relative to a tensor's largest entry.
        clock: times a run.
        rounds: of A B B A.
        passes: what is timed, by name.
        alone: yield our form's time without the others, too, and on a GPU the memory of each.
        at_most_ms: what is aimed at for our training pass alone.
    """
    checked = inputs if small is None else small
    expected = expected_of(reference, checked)
    own = judge(ours, checked, expected, bound)
    if own.state != "measured":
        yield Row(part, case, ours.name, "", own.state, own.reason, our_fault=True)
        return
    if alone:
        try:
            for name, prepare in passes.items():
                seconds = timed(prepare(ours, inputs), clock, rounds).median
                aim = at_most_ms if name in TRAINING else None
                what = f"{ours.name}: {case}, {name}"
                yield Quantity(part, what, 1e3 * seconds, "ms", at_most=aim)
            yield from _memory(part, case, ours, inputs, clock)
        except Exception as error:
            yield Row(part, case, ours.name, "", "failed", first_line(error), our_fault=True)
            return
    for other in others:
        their = judge(other, checked, expected, bound)
        if their.state != "measured":
            yield Row(part, case, ours.name, other.name, their.state, their.reason)
            continue
        try:
            for name, prepare in passes.items():
                found = compare(prepare(ours, inputs), prepare(other, inputs), clock, rounds)
                aim = other.at_least if name in TRAINING else None
                what = f"{case}, {name}"
                yield Row(part, what, ours.name, other.name, comparison=found, at_least=aim)
            if alone:
                yield from _memory(part, case, other, inputs, clock)
        except Exception as error:
            # Out of memory at full size, say: the rest is measured.
            yield Row(part, case, ours.name, other.name, "failed", first_line(error))


def _memory(part: str, case: str, form: Form, inputs: Tensors, clock: Clock) -> Iterator[Quantity]:
    """Yield the most memory of a GPU that a training pass takes beside its inputs."""
    if clock.on_cpu:
        return
    run = forward_backward(form, inputs)
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    run()
    peak = torch.accelerator.max_memory_allocated() - before
    yield Quantity(part, f"{form.name}: {case}, fwd+bwd: memory", peak / 1e9, "GB")


def timed(run: Callable[[], None], clock: Clock, rounds: int = ROUNDS) -> Spread:
    """Return the seconds of a run by itself, after a warm-up."""
    for _ in range(clock.warm_up):
        run()
    return Spread.of([clock(run).wall for _ in range(2 * rounds)])
