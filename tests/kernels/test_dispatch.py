"""Backend choice: auto, forced from outside, unknown, and the line that says why."""

import logging

import pytest
from megarec_kernels.dispatch import choose_backend


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
