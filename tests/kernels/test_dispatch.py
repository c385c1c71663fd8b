"""Backend choice: auto, forced from outside, unknown, and the line that says why."""

import logging

import pytest
import torch
from megarec_kernels import dispatch
from megarec_kernels.dispatch import choose_backend, triton_problem


def test_auto_takes_the_fastest_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, logger="megarec_kernels"):
        assert choose_backend("some_op", "auto") == "eager"
        assert choose_backend("some_op", "auto") == "eager"
    assert caplog.messages == ["some_op runs on backend eager (auto: the fastest that is built)"]


def test_the_caller_chooses():
    assert choose_backend("op", "reference") == "reference"


def test_the_environment_overrides_the_caller(monkeypatch, caplog):
    monkeypatch.setenv("MEGAREC_KERNELS", "reference")
    with caplog.at_level(logging.INFO, logger="megarec_kernels"):
        assert choose_backend("forced_op", "eager") == "reference"
    assert caplog.messages == ["forced_op runs on backend reference (forced by MEGAREC_KERNELS)"]


def test_unknown_and_unbuilt_backends(monkeypatch):
    with pytest.raises(
        ValueError, match="backend: got 'fast', expected one of 'auto', 'reference'"
    ):
        choose_backend("op", "fast")
    monkeypatch.setenv("MEGAREC_KERNELS", "gpu")
    with pytest.raises(ValueError, match="op: MEGAREC_KERNELS='gpu' is not built yet"):
        choose_backend("op", "auto")


def test_where_triton_runs(monkeypatch):
    x = torch.zeros(2)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_problem(x) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert triton_problem(x).startswith("needs tensors on a GPU, got cpu")
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert triton_problem(x) == "needs Triton: pip install triton"


def test_auto_says_why_it_is_not_the_gpu(caplog):
    with caplog.at_level(logging.INFO, logger="megarec_kernels"):
        assert choose_backend("a_gpu_op", "auto", ("eager", "gpu"), "eager", "no GPU") == "eager"
    assert caplog.messages == ["a_gpu_op runs on backend eager (auto: not gpu: no GPU)"]
    with pytest.raises(ValueError, match="^a_gpu_op: backend='gpu': no GPU$"):
        choose_backend("a_gpu_op", "gpu", ("eager", "gpu"), "eager", "no GPU")
