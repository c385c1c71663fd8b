"""Check every op on this machine: each form, forward and gradients, against float64 references.

    python -m megarec_kernels.check

It prints a table, and exits with 1 and the names of those that are wrong, if any are.
"""

import argparse
import functools
import importlib
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megarec_kernels.affine_scan import affine_scan
from megarec_kernels.attention import attention
from megarec_kernels.causal_conv1d import causal_conv1d
from megarec_kernels.dispatch import ENVIRONMENT_VARIABLE
from megarec_kernels.gated_linear_attention import gated_linear_attention
from megarec_kernels.grouped_norm import grouped_norm
from megarec_kernels.linear_cross_entropy import VocabularyPart, linear_cross_entropy
from megarec_kernels.linear_distillation import linear_distillation
from megarec_kernels.newton_rnn import Cell, ParaGRUCell, ParaLSTMCell, Solver, newton_rnn
from megarec_kernels.rotary import rotary
from megarec_kernels.swiglu import swiglu

Tensors = dict[str, Tensor]
Draw = Callable[..., Tensor]
"""Called with sizes: a normal tensor of that shape, float64."""
State = Literal["ok", "WRONG", "not available"]

B, T = 2, 130
"""Rows and tokens of the cases: two chunks of 64, and a bit."""


@dataclass(frozen=True)
class Case:
    """A small use of an op.

    Attributes:
        op: its name; its package lists its forms in `FORMS`.
        run: (backend, **inputs) -> outputs by name.
        inputs: of numbers drawn in float64; those of a float dtype are rounded, and are
            differentiated.
        bounds: dtypes that are checked, and the largest error in each.
        variant: what is special about it.
    """

    op: str
    run: Callable[..., Tensors]
    inputs: Callable[[Draw], Tensors]
    bounds: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-5, torch.bfloat16: 2**-6}
    )
    variant: str = ""

    @property
    def name(self) -> str:
        """The op, and its variant in brackets."""
        return f"{self.op} ({self.variant})" if self.variant else self.op


@dataclass(frozen=True)
class Result:
    """What a form gave: its worst relative error, or why there is none."""

    case: str
    form: str
    dtype: str
    state: State
    error: float | None
    bound: float
    reason: str = ""


def _gated_linear_attention(backend: str, **inputs: Any) -> Tensors:
    state: Tensors = {key: inputs.pop(key) for key in ("C", "n", "m") if key in inputs}
    y, after, log_decay = gated_linear_attention(
        **inputs,
        state=state or None,
        gate="exp" if state else "plain",
        normalize=bool(state),
        backend=backend,
    )
    # No gradient flows through m, which is the unit of C and n.
    after = {key: x.detach() if key == "m" else x for key, x in after.items()}
    return {"y": y, "log_decay": log_decay} | {f"final {key}": x for key, x in after.items()}


def _gates(draw: Draw, heads: int) -> Tensors:
    return {
        "log_f": F.logsigmoid(draw(B, T, heads) + 2),
        "log_i": draw(B, T, heads),
        "resets": _resets(),
    }


def _mlstm_inputs(draw: Draw) -> Tensors:
    tokens = {"q": draw(B, T, 2, 16), "k": draw(B, T, 2, 16), "v": draw(B, T, 2, 32)}
    state = {"C": draw(B, 2, 16, 32), "n": draw(B, 2, 16), "m": draw(B, 2)}
    return tokens | _gates(draw, heads=2) | state


def _mamba2_inputs(draw: Draw) -> Tensors:
    tokens = {"q": draw(B, T, 2, 16), "k": draw(B, T, 2, 16), "v": draw(B, T, 4, 32)}
    return tokens | _gates(draw, heads=4)


def _causal_conv1d(backend: str, **inputs: Tensor) -> Tensors:
    y, tail = causal_conv1d(**inputs, activation="silu", backend=backend)
    return {"y": y, "tail after": tail}


def _rotary(backend: str, x: Tensor, position: Tensor, *, interleaved: bool) -> Tensors:
    # Angles of float64 for every dtype: they are no part of the op.
    angle = position.cpu().double()[..., None, None] * 10 ** -torch.arange(6, dtype=torch.float64)
    rotation = torch.stack([angle.cos(), angle.sin()])
    rotation = rotation.to(torch.promote_types(x.dtype, torch.float32)).to(x.device)
    return {"y": rotary(x, rotation, interleaved=interleaved, backend=backend)}


def _rotary_case(variant: str, interleaved: bool) -> Case:
    def inputs(draw: Draw) -> Tensors:
        # The rows start at different positions; 4 dimensions of 16 stay.
        return {"x": draw(B, T, 3, 16), "position": torch.arange(B * T).view(B, T)}

    return Case(
        "rotary", functools.partial(_rotary, interleaved=interleaved), inputs, variant=variant
    )


def _newton_rnn(cell: Cell, backend: str, u: Tensor, state: Tensor, **inputs: Tensor) -> Tensors:
    params = {key: inputs[key] for key in cell.recurrent}
    # Iterations enough for the bounds: what is left is rounding.
    solver = Solver(iterations=12, tolerance=1e-5)
    h, last, _ = newton_rnn(
        cell, u, params, state=state, resets=inputs["resets"], solver=solver, backend=backend
    )
    return {"h": h, "last": last}


def _newton_inputs(cell: Cell, draw: Draw) -> Tensors:
    params = {name: 0.5 * draw(rows, 24).tanh() for name, rows in cell.recurrent.items()}
    state = draw(B, cell.num_slots, 24).tanh()
    return {"u": draw(B, T, cell.num_inputs, 24), "state": state, "resets": _resets()} | params


def _newton_case(variant: str, cell: Cell) -> Case:
    return Case(
        "newton_rnn",
        functools.partial(_newton_rnn, cell),
        functools.partial(_newton_inputs, cell),
        variant=variant,
    )


def _cross_entropy(vocabulary: VocabularyPart | None, backend: str, **inputs: Any) -> Tensors:
    options: dict[str, Any] = {"soft_cap": 5.0, "z_loss": 1e-2, "chunk_size": 64}
    loss = linear_cross_entropy(**inputs, **options, vocabulary=vocabulary, backend=backend)
    return {"loss": loss}


def _cross_entropy_case(variant: str, vocabulary: VocabularyPart | None, vocab_size: int) -> Case:
    return Case(
        "linear_cross_entropy",
        functools.partial(_cross_entropy, vocabulary),
        lambda draw: {
            "x": draw(B, T, 32),
            "weight": 0.3 * draw(99, 32),
            "labels": _labels(vocab_size),
        },
        variant=variant,
    )


def _distillation(backend: str, **inputs: Any) -> Tensors:
    teacher = {key: inputs.pop(key).detach() for key in ("teacher_x", "teacher_weight")}
    losses = linear_distillation(
        **inputs,
        **teacher,
        temperature=1.7,
        ce_weight=0.4,
        soft_cap=5.0,
        chunk_size=64,
        backend=backend,
    )
    return losses._asdict()


def _resets() -> Tensor:
    """Return resets (B, T): documents of all kinds in the first row, one in the others."""
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[0, [0, 1, 63, 64, 100]] = True
    return resets


def _labels(vocab_size: int) -> Tensor:
    labels = torch.arange(B * T) * 7 % vocab_size
    labels[::5] = -100
    return labels.view(B, T)


def _linear_attention_case(variant: str, inputs: Callable[[Draw], Tensors]) -> Case:
    # Where a normaliser is near 0 it magnifies the rounding of what it divides.
    bounds = {torch.float32: 2e-5, torch.bfloat16: 2**-6}
    return Case("gated_linear_attention", _gated_linear_attention, inputs, bounds, variant)


CASES = (
    _linear_attention_case("mLSTM", _mlstm_inputs),
    _linear_attention_case("Mamba-2", _mamba2_inputs),
    Case(
        "causal_conv1d",
        _causal_conv1d,
        lambda draw: {
            "x": draw(B, T, 48),
            "weight": draw(48, 4),
            "bias": draw(48),
            "tail": draw(B, 3, 48),
            "resets": _resets(),
        },
    ),
    Case(
        "grouped_norm",
        lambda backend, **inputs: {
            "y": grouped_norm(**inputs, eps=1e-6, group_dim=24, backend=backend)
        },
        lambda draw: {"x": draw(B, T, 48), "weight": draw(48), "gate": draw(B, T, 48)},
        variant="gated RMSNorm",
    ),
    Case(
        "grouped_norm",
        lambda backend, **inputs: {
            "y": grouped_norm(**inputs, eps=1e-6, center=True, backend=backend)
        },
        lambda draw: {"x": draw(B, T, 48)},
        variant="LayerNorm",
    ),
    Case(
        "swiglu",
        lambda backend, **inputs: {"y": swiglu(**inputs, backend=backend)},
        lambda draw: {"gate": draw(B, T, 48), "up": draw(B, T, 48)},
    ),
    _rotary_case("halves", interleaved=False),
    _rotary_case("neighbours", interleaved=True),
    Case(
        "attention",
        lambda backend, **inputs: {"y": attention(**inputs, window=60, backend=backend)},
        lambda draw: {
            "q": draw(B, T, 4, 16),
            "k": draw(B, T, 2, 16),
            "v": draw(B, T, 2, 32),
            "resets": _resets(),
        },
    ),
    Case(
        "affine_scan",
        lambda backend, **inputs: {"h": affine_scan(**inputs, backend=backend)},
        lambda draw: {
            "A": 0.9 * draw(B, T, 3, 24).tanh(),
            "b": draw(B, T, 3, 24),
            "state": draw(B, 3, 24),
            "resets": _resets(),
        },
        variant="diagonal",
    ),
    Case(
        "affine_scan",
        lambda backend, **inputs: {"h": affine_scan(**inputs, reverse=True, backend=backend)},
        lambda draw: {
            "A": 0.5 * draw(B, T, 2, 2, 24).tanh(),
            "b": draw(B, T, 2, 24),
            "state": draw(B, 2, 24),
            "resets": _resets(),
        },
        variant="2x2, reverse",
    ),
    _newton_case("ParaGRU", ParaGRUCell()),
    _newton_case("ParaLSTM", ParaLSTMCell()),
    _cross_entropy_case("", None, 99),
    # One rank, which meets no other: some labels are not in its part.
    _cross_entropy_case("vocabulary part", VocabularyPart(50, lambda x: x, lambda x: x), 200),
    Case(
        "linear_distillation",
        _distillation,
        lambda draw: {
            "x": draw(B, T, 32),
            "weight": 0.3 * draw(99, 32),
            "teacher_x": draw(B, T, 16),
            "teacher_weight": 0.3 * draw(99, 16),
            "labels": _labels(99),
        },
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Check all cases and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced:
        print(
            f"error: {ENVIRONMENT_VARIABLE}={forced} makes all forms that one; unset it",
            file=sys.stderr,
        )
        return 2
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    print(f"{device_name(device)}, torch {torch.__version__}, Python {platform.python_version()}")
    results = []
    row = "{:38} {:10} {:9} {:>9} {:>9}  {}".format
    print(row("op", "form", "dtype", "error", "bound", ""))
    for result in check(CASES, device):
        results.append(result)
        error = "" if result.error is None else f"{result.error:.1e}"
        verdict = f"{result.state}: {result.reason}" if result.reason else result.state
        print(row(result.case, result.form, result.dtype, error, f"{result.bound:.1e}", verdict))
    wrong = [r for r in results if r.state == "WRONG"]
    for r in wrong:
        print(f"error: wrong: {r.case}, form {r.form}, {r.dtype}", file=sys.stderr)
    return 1 if wrong else 0


def check(cases: Iterable[Case], device: torch.device) -> Iterable[Result]:
    """Yield how each form of each case does on the device, in each dtype."""
    for case in cases:
        forms = importlib.import_module(f"megarec_kernels.{case.op}").FORMS
        for dtype, bound in case.bounds.items():
            inputs = rounded(case.inputs(_drawer()), dtype)
            # On the CPU whatever the device: some have no float64.
            wide = rounded(inputs, torch.float64)
            expected = outputs_and_gradients(functools.partial(case.run, "reference"), wide)
            here = {name: x.to(device) for name, x in inputs.items()}
            for form in forms:
                state, error, reason = _judge(case, form, here, expected, bound)
                name = str(dtype).removeprefix("torch.")
                yield Result(case.name, form, name, state, error, bound, reason)


def _judge(
    case: Case, form: str, inputs: Tensors, expected: Tensors, bound: float
) -> tuple[State, float | None, str]:
    try:
        actual = outputs_and_gradients(functools.partial(case.run, form), inputs)
    except Exception as error:
        reason = first_line(error)
        # A form for GPUs says by these what it misses; any other form must run anywhere.
        missing = isinstance(error, ImportError | ValueError) and form == "gpu"
        on_cpu = next(iter(inputs.values())).device.type == "cpu"
        if missing and (on_cpu or isinstance(error, ImportError)):
            return "not available", None, reason
        return "WRONG", None, reason
    worst, name = worst_error(actual, expected)
    return ("ok", worst, "") if worst <= bound else ("WRONG", worst, name)


def outputs_and_gradients(run: Callable[..., Tensors], inputs: Tensors) -> Tensors:
    """Return what `run(**inputs)` does, and the gradients of a random function of it as `d<name>`.

    Inputs of a float dtype are differentiated, where they have a part in the outputs.
    """
    leaves = {
        name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()
    }
    outputs = run(**leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    rooted = [x for x in outputs.values() if x.requires_grad]
    gradients = torch.autograd.grad(
        rooted, list(wanted.values()), [cotangent(x) for x in rooted], allow_unused=True
    )
    results = {name: x.detach() for name, x in outputs.items()}
    return results | {
        f"d{name}": gradient
        for name, gradient in zip(wanted, gradients, strict=True)
        if gradient is not None
    }


def cotangent(x: Tensor) -> Tensor:
    """Return a gradient of x: random, the same in all dtypes and on all devices."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.bfloat16().to(x.device, x.dtype)


def worst_error(actual: Tensors, expected: Tensors) -> tuple[float, str]:
    """Return the largest error relative to a tensor's largest entry, and that tensor's name.

    It is inf where names, shapes, infinities or NaNs differ.
    """
    if actual.keys() != expected.keys():
        return math.inf, f"tensors {sorted(actual)}, expected {sorted(expected)}"
    errors = {name: _error(actual[name], want) for name, want in expected.items()}
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


def _error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return math.inf
    got, want = actual.detach().double().to("cpu"), expected.detach().double().to("cpu")
    infinite = want.isinf()
    if not got.isfinite()[~infinite].all() or not torch.equal(got[infinite], want[infinite]):
        return math.inf
    got, want = got[~infinite], want[~infinite]
    if want.numel() == 0:
        return 0.0
    size, error = want.abs().max().item(), (got - want).abs().max().item()
    return error / size if size else (math.inf if error else 0.0)


def rounded(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Return the tensors, those of a float dtype in this one."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


def first_line(error: Exception) -> str:
    """Return an error's first line, and its kind where it does not say itself what is wrong."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return (
        text if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: {text}"
    )


def device_name(device: torch.device) -> str:
    """Return a readable name of the device."""
    if device.type == "cpu":
        return f"cpu ({platform.machine()})"
    return str(torch.get_device_module(device).get_device_name(device))


def _drawer() -> Draw:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    return draw


if __name__ == "__main__":
    sys.exit(main())
