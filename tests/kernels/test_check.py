"""The check of all ops: it passes here, and names what is broken."""

import sys

import pytest
import torch
from megarec_kernels import check
from megarec_kernels.check import CASES, main, worst_error


@pytest.fixture
def forms(monkeypatch):
    """Check attention alone; returns its forms, which a test may break."""
    monkeypatch.setattr(check, "CASES", [case for case in CASES if case.op == "attention"])
    module = sys.modules["megarec_kernels.attention"]
    monkeypatch.setattr(module, "FORMS", dict(module.FORMS))
    return module.FORMS


def test_every_op_is_right_here(capsys):
    assert main([]) == 0
    output = capsys.readouterr().out
    rows = [line.split() for line in output.splitlines()[2:]]
    assert all(row[-1] == "ok" for row in rows if "gpu" not in row)
    assert {row[0] for row in rows} == {case.op for case in CASES}
    assert "not available: attention: backend='gpu' needs tensors on a GPU" in output


@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_a_wrong_form_is_named(forms, capsys, broken):
    right = forms["eager"]

    class TwiceTheGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    def wrong(*arguments):
        y = right(*arguments)
        return 1.001 * y if broken == "forward" else TwiceTheGradient.apply(y)

    forms["eager"] = wrong
    assert main([]) == 1
    output = capsys.readouterr()
    # bfloat16 has room for an error of 1e-3, but not for a wrong gradient.
    dtypes = ["float32"] if broken == "forward" else ["float32", "bfloat16"]
    assert output.err.splitlines() == [
        f"error: wrong: attention, form eager, {dtype}" for dtype in dtypes
    ]
    assert output.out.count("WRONG") == len(dtypes)


@pytest.mark.parametrize("error", [ValueError("no such width"), RuntimeError("no such width")])
def test_only_a_form_for_gpus_may_be_missing(forms, capsys, error):
    def fails(*_):
        raise error

    forms["gpu"] = fails
    missing = isinstance(error, ValueError)
    assert main([]) == (0 if missing else 1)
    output = capsys.readouterr().out
    assert ("not available: no such width" in output) == missing
    assert ("WRONG: RuntimeError: no such width" in output) != missing
    forms["eager"] = fails
    assert main([]) == 1


def test_a_forced_backend_would_make_it_empty(monkeypatch, capsys):
    monkeypatch.setenv("MEGAREC_KERNELS", "eager")
    assert main([]) == 2
    assert "MEGAREC_KERNELS=eager" in capsys.readouterr().err


def test_worst_error():
    want = {"y": torch.tensor([2.0, -4.0]), "z": torch.tensor([-torch.inf, 1.0])}
    assert worst_error(want, want)[0] == 0
    assert worst_error(want | {"y": torch.tensor([2.0, -4.4])}, want) == (pytest.approx(0.1), "y")
    for z in ([0.0, 1.0], [-torch.inf, torch.nan], [-torch.inf, torch.inf], [1.0]):
        assert worst_error(want | {"z": torch.tensor(z)}, want) == (torch.inf, "z")
    assert worst_error({"y": want["y"]}, want)[0] == torch.inf
