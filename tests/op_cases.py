"""Random inputs and comparisons shared by the tests of ops: tensors in and out, by name."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from gla_cases import assert_close, cast
from torch import Tensor

Tensors = dict[str, Tensor]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels are tested: on a GPU, or without one in Triton's interpreter."""


def random_inputs(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensors:
    """Return normal numbers drawn in float64, then rounded."""
    rng = torch.Generator().manual_seed(seed)
    drawn = {k: torch.randn(s, generator=rng, dtype=torch.float64) for k, s in shapes.items()}
    return cast(drawn, dtype)


def make_resets(B: int, T: int, *starts: int) -> Tensor:
    """Return resets at `starts` in row 0, at every token in row 1, and nowhere else."""
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[0, list(starts)] = True
    resets[1:2] = True
    return resets


def start_gradients(outputs: Tensors) -> list[Tensor]:
    """Return random gradients of outputs, of numbers that every dtype holds."""
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=rng).bfloat16().to(x) for x in outputs.values()]


def outputs_and_gradients(run: Callable[..., Tensors], inputs: Tensors, **options: Any) -> Tensors:
    """Return what `run(**inputs, **options)` does, and the gradients of a random function of it."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    outputs = run(**leaves, **options)
    start = start_gradients(outputs)
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), start)
    results = {name: x.detach() for name, x in outputs.items()}
    return results | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def compare(
    run: Callable[..., Tensors],
    inputs: Tensors,
    bounds: Mapping[torch.dtype, float],
    **options: Any,
) -> None:
    """Compare eager in every dtype with the float64 reference of the same, rounded, inputs."""
    for dtype, bound in bounds.items():
        rounded = cast(inputs, dtype)
        actual = outputs_and_gradients(run, rounded, backend="eager", **options)
        assert {x.dtype for x in actual.values()} == {dtype}
        exact = cast(rounded, torch.float64)
        expected = outputs_and_gradients(run, exact, backend="reference", **options)
        assert_close(actual, expected, bound)


def compare_gpu(
    run: Callable[..., Tensors],
    inputs: Tensors,
    bounds: Mapping[torch.dtype, float],
    **options: Any,
) -> None:
    """Compare the kernels in every dtype with the float64 reference of the same, rounded, inputs.

    `bounds` are of the RMS of the error, relative to that of what is expected.
    """
    for dtype, bound in bounds.items():
        rounded = cast(inputs, dtype)
        with poisoned_memory():
            actual = outputs_and_gradients(
                run, on_device(rounded), backend="gpu", **on_device(options)
            )
        assert {x.dtype for x in actual.values()} == {dtype}
        exact = cast(rounded, torch.float64)
        expected = outputs_and_gradients(run, exact, backend="reference", **options)
        for name, want in expected.items():
            error, size = (actual[name].cpu() - want).norm(), want.norm()
            assert error <= bound * size, f"{dtype}: {name}: {error:.3g} of {size:.3g}"


def on_device(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in values.items()}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let torch.empty be full of NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
