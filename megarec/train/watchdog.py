"""End a process whose step takes too long (and say where it hangs), or whose launcher is gone."""

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType
from typing import Self, TextIO

LOG_LEAD_SECONDS = 0.5
PARENT_SECONDS = 0.5


def exit_with_parent() -> None:
    """End this process, within a second, when the process that started it is gone.

    A launcher killed by SIGKILL cannot end its workers: they would train on, holding the lock.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


class Watchdog:
    """A step that lasts longer than `timeout` seconds ends the process with exit code 1.

    First the Python stacks of all threads go to stderr and, where given, to the rank's log file.
    The clock is a C thread (faulthandler), so that a step that hangs inside a collective, with the
    interpreter locked, still ends; only the copy in the log needs the interpreter.
    Call ``arm`` at the start of each step; leaving the context disarms.
    """

    def __init__(self, timeout: float, log: TextIO | None = None) -> None:
        self._timeout = timeout
        self._log = log
        self._log_timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.disarm()

    def arm(self) -> None:
        """Start the clock, from zero if it runs."""
        self.disarm()
        if self._log is not None:
            self._log_timer = threading.Timer(self._timeout, self._dump_to_log, (self._log,))
            self._log_timer.daemon = True
            self._log_timer.start()
        # The log comes first: the process is gone once the C thread has fired.
        lead = 0.0 if self._log is None else LOG_LEAD_SECONDS
        faulthandler.dump_traceback_later(self._timeout + lead, exit=True, file=sys.stderr)

    def disarm(self) -> None:
        """Stop the clock."""
        faulthandler.cancel_dump_traceback_later()
        if self._log_timer is not None:
            self._log_timer.cancel()
            self._log_timer = None

    def _dump_to_log(self, log: TextIO) -> None:
        log.write(f"step timeout: no progress for {self._timeout:g} s\n")
        log.flush()
        faulthandler.dump_traceback(log, all_threads=True)
