"""Which implementation of an op runs: the caller's choice, MEGAREC_KERNELS, or the fastest."""

import functools
import logging
import os

ENVIRONMENT_VARIABLE = "MEGAREC_KERNELS"
BACKENDS = ("reference", "eager")

logger = logging.getLogger(__name__)


def choose_backend(op: str, backend: str) -> str:
    """Return "reference" or "eager" for ``op``, and log once why it was chosen.

    ``backend`` is what the caller asked for: "auto" takes the fastest that is built. The
    environment variable MEGAREC_KERNELS, when set, overrides the caller.

    Raises ValueError for a backend that is unknown or not built.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if forced:
        asked, name, reason = forced, ENVIRONMENT_VARIABLE, f"forced by {ENVIRONMENT_VARIABLE}"
    else:
        asked, name, reason = backend, "backend", "asked for by the caller"
    if asked == "auto":
        asked, reason = "eager", "auto: the fastest that is built"
    if asked == "gpu":
        raise ValueError(f"{op}: {name}='gpu' is not built yet; use 'auto' or 'eager'")
    if asked not in BACKENDS:
        raise ValueError(f"{op}: {name}: got {asked!r}, expected 'auto', 'reference' or 'eager'")
    _log_once(op, asked, reason)
    return asked


@functools.cache
def _log_once(op: str, backend: str, reason: str) -> None:
    logger.info("%s runs on backend %s (%s)", op, backend, reason)
