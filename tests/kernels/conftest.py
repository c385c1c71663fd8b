"""A backend forced from outside would make the comparisons between backends empty."""

import pytest


@pytest.fixture(autouse=True)
def _no_forced_backend(monkeypatch):
    monkeypatch.delenv("MEGAREC_KERNELS", raising=False)
