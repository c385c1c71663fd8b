"""Signals that ask a run to save and stop."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_SECONDS = 1.0
"""Ctrl-C reaches a worker twice: from the terminal and from torchrun, which passes it on."""


class StopSignal:
    """While entered, SIGTERM, SIGUSR1 and SIGINT set ``received`` and do nothing else.

    The trainer reads ``received`` once a step. A second signal ends the process at once with
    128 + its number; one that follows within ``ECHO_SECONDS`` is the first one, passed on again.
    Enter it in the main thread: Python sets handlers nowhere else.

    A thread reads the signals from Python's wakeup pipe: a plain handler would wait for the main
    thread, which may hang in a collective when the second signal comes.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous_fd = signal.set_wakeup_fd(self._write_end)
        self._previous: dict[signal.Signals, Any] = {
            number: signal.signal(number, _only_wake) for number in HANDLED
        }
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._write_end)
        self._thread.join()
        os.close(self._read_end)

    def _listen(self) -> None:
        first = 0.0
        while byte := os.read(self._read_end, 1):
            number = byte[0]
            if number not in HANDLED:
                continue
            if self.received is None:
                self.received = signal.Signals(number)
                first = time.monotonic()
            elif time.monotonic() - first > ECHO_SECONDS:
                os._exit(128 + number)


def _only_wake(number: int, frame: FrameType | None) -> None:
    """Exist: the wakeup pipe gets only signals that have a Python handler."""
