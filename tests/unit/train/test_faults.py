"""Faults strike at their point, step and rank only."""

import errno
import time

import pytest

from megarec.errors import UserError
from megarec.train import faults
from megarec.train.faults import fault


def test_nothing_happens_without_the_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MEGAREC_FAULT", raising=False)
    assert not any(fault(point, 0) for point in faults.POINTS)


def test_it_strikes_at_its_point_step_and_rank_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEGAREC_FAULT", "after_backward:7:1:nan")
    monkeypatch.setenv("RANK", "1")
    assert fault("after_backward", 7)
    assert not fault("after_backward", 6)
    assert not fault("before_optim", 7)
    monkeypatch.setenv("RANK", "0")
    assert not fault("after_backward", 7)


def test_actions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MEGAREC_FAULT", "data_next:3:0:enospc")
    with pytest.raises(OSError, match="No space left") as caught:
        fault("data_next", 3)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setenv("MEGAREC_FAULT", "data_next:3:0:raise")
    with pytest.raises(RuntimeError, match="data_next:3:0:raise"):
        fault("data_next", 3)
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("MEGAREC_FAULT", "data_next:3:0:hang")
    assert not fault("data_next", 3)
    assert slept == [faults.HANG_SECONDS]


def test_kill9_sends_sigkill_to_itself(monkeypatch: pytest.MonkeyPatch):
    sent = []
    monkeypatch.setattr(faults.os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setenv("MEGAREC_FAULT", "step_begin:0:0:kill9")
    fault("step_begin", 0)
    assert sent == [(faults.os.getpid(), 9)]


@pytest.mark.parametrize(
    "text", ["", "x", "nowhere:1:0:raise", "step_begin:one:0:raise", "step_begin:1:0:explode"]
)
def test_a_malformed_variable_is_a_user_error(text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEGAREC_FAULT", text)
    with pytest.raises(UserError, match="expected point:step:rank:action"):
        fault("step_begin", 1)
