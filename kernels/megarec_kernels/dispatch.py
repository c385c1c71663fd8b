"""Which implementation of an op runs: the caller's choice, MEGAREC_KERNELS, or the fastest."""

import functools
import logging
import os
from collections.abc import Collection

import torch

ENVIRONMENT_VARIABLE = "MEGAREC_KERNELS"
BACKENDS = ("reference", "eager", "gpu")

logger = logging.getLogger(__name__)


def choose_backend(
    op: str,
    backend: str,
    built: Collection[str] = ("reference", "eager"),
    fastest: str = "eager",
) -> str:
    """Return "reference", "eager" or "gpu" for ``op``, and log once why it was chosen.

    ``backend`` is what the caller asked for: "auto" takes ``fastest``, which the op names for the
    inputs at hand. ``built`` are the forms that the op has. The environment variable
    MEGAREC_KERNELS, when set, overrides the caller.

    Raises ValueError for a backend that is unknown or not built.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if forced:
        asked, name, reason = forced, ENVIRONMENT_VARIABLE, f"forced by {ENVIRONMENT_VARIABLE}"
    else:
        asked, name, reason = backend, "backend", "asked for by the caller"
    if asked == "auto":
        asked, reason = fastest, "auto: the fastest that is built"
    if asked not in BACKENDS:
        known = ", ".join(f"'{form}'" for form in ("auto", *built))
        raise ValueError(f"{op}: {name}: got {asked!r}, expected one of {known}")
    if asked not in built:
        raise ValueError(f"{op}: {name}='{asked}' is not built yet; use 'auto' or 'eager'")
    if not torch.compiler.is_compiling():
        _log_once(op, asked, reason)
    return asked


@functools.cache
def _log_once(op: str, backend: str, reason: str) -> None:
    logger.info("%s runs on backend %s (%s)", op, backend, reason)
