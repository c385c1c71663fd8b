"""Which implementation of an op runs: the caller's choice, MEGAREC_KERNELS, or the fastest."""

import functools
import logging
import os
from collections.abc import Collection
from importlib.util import find_spec

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "MEGAREC_KERNELS"
BACKENDS = ("reference", "eager", "gpu")
HAS_TRITON = find_spec("triton") is not None

logger = logging.getLogger(__name__)


def choose_backend(
    op: str,
    backend: str,
    built: Collection[str] = ("reference", "eager"),
    fastest: str = "eager",
    gpu_problem: str | None = None,
) -> str:
    """Return "reference", "eager" or "gpu" for ``op``, and log once why it was chosen.

    ``backend`` is what the caller asked for: "auto" takes ``fastest``, which the op names for the
    inputs at hand. ``built`` are the forms that the op has. The environment variable
    MEGAREC_KERNELS, when set, overrides the caller. ``gpu_problem`` says why the form "gpu" cannot
    run here, if so.

    Raises ValueError for a backend that is unknown, not built, or "gpu" where it cannot run.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if forced:
        asked, name, reason = forced, ENVIRONMENT_VARIABLE, f"forced by {ENVIRONMENT_VARIABLE}"
    else:
        asked, name, reason = backend, "backend", "asked for by the caller"
    if asked == "auto":
        asked, reason = fastest, "auto: the fastest that is built"
        if gpu_problem is not None:
            reason = f"auto: not gpu: {gpu_problem}"
    if asked not in BACKENDS:
        known = ", ".join(f"'{form}'" for form in ("auto", *built))
        raise ValueError(f"{op}: {name}: got {asked!r}, expected one of {known}")
    if asked not in built:
        raise ValueError(f"{op}: {name}='{asked}' is not built yet; use 'auto' or 'eager'")
    if asked == "gpu" and gpu_problem is not None:
        raise ValueError(f"{op}: {name}='gpu': {gpu_problem}")
    _log_once(op, asked, reason)
    return asked


def triton_problem(x: Tensor) -> str | None:
    """Return why Triton kernels cannot run where the tensor is, or None where they can."""
    if not HAS_TRITON:
        return "needs Triton: pip install triton"
    if x.is_cuda or os.environ.get("TRITON_INTERPRET", "") == "1":
        return None
    return f"needs tensors on a GPU, got {x.device} (or TRITON_INTERPRET=1, to try it slowly)"


@torch.compiler.assume_constant_result  # torch.compile runs it while it traces
def _log_once(op: str, backend: str, reason: str) -> None:
    _log(op, backend, reason)


@functools.cache
def _log(op: str, backend: str, reason: str) -> None:
    logger.info("%s runs on backend %s (%s)", op, backend, reason)
