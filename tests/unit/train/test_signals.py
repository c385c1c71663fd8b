"""The first signal is noted, the second ends the process, and handlers are given back."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megarec.train import signals
from megarec.train.signals import StopSignal


def wait_for(stop: StopSignal) -> signal.Signals | None:
    deadline = time.monotonic() + 5
    while stop.received is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return stop.received


@pytest.mark.parametrize("number", signals.HANDLED)
def test_a_signal_is_noted_and_does_nothing_else(number: signal.Signals):
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert wait_for(stop) is number


def test_other_signals_keep_their_handlers():
    seen = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.1)
        assert stop.received is None
    signal.signal(signal.SIGUSR2, before)
    assert seen == [signal.SIGUSR2]


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in signals.HANDLED]
    with StopSignal():
        assert [signal.getsignal(number) for number in signals.HANDLED] != before
    assert [signal.getsignal(number) for number in signals.HANDLED] == before
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    assert descriptor == -1


def test_a_signal_passed_on_twice_counts_once():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert wait_for(stop) is signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
    assert stop.received is signal.SIGINT


BLOCKED = """
import threading
from megarec.train import signals
signals.ECHO_SECONDS = 0.1
with signals.StopSignal():
    print("ready", flush=True)
    # Where the main thread runs no Python, as in a collective: a wait that restarts after a signal.
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""


def test_a_second_signal_ends_a_process_that_hangs():
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM
    process.stdout.close()
