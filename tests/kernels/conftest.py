"""Where kernels run, and that no backend is forced."""

import os

import pytest
import torch

# Without a GPU, Triton's interpreter runs kernels on the CPU; it is chosen when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _no_forced_backend(monkeypatch):
    # It would make the comparisons between backends empty.
    monkeypatch.delenv("MEGAREC_KERNELS", raising=False)
