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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megarec_kernels.check_cases import CASES, Case, Draw, Tensors
from megarec_kernels.dispatch import ENVIRONMENT_VARIABLE

State = Literal["ok", "WRONG", "not available"]


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
