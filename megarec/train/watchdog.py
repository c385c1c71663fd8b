"""End a process whose step takes too long (and say where it hangs), or whose launcher is gone."""

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType
from typing import Self

GRACE_SECONDS = 3.0
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

    First the Python stacks of all threads go to stderr. Where one rank hangs the others wait for
    it, and a launcher kills them all once the first is gone: each writes its stacks and then gives
    the others GRACE_SECONDS to do the same. Should the interpreter be locked, a C thread
    (faulthandler) does both at the end of that time.
    Call ``arm`` at the start of each step; leaving the context disarms.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._timer: threading.Timer | None = None

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
        self._timer = threading.Timer(self._timeout, self._end)
        self._timer.daemon = True
        self._timer.start()
        last = self._timeout + 2 * GRACE_SECONDS
        faulthandler.dump_traceback_later(last, exit=True, file=sys.stderr)

    def disarm(self) -> None:
        """Stop the clock."""
        faulthandler.cancel_dump_traceback_later()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        rank = os.environ.get("RANK", "0")
        message = f"rank {rank}: step timeout: no progress for {self._timeout:g} s; its stacks:\n"
        sys.stderr.write(message)
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        time.sleep(GRACE_SECONDS)
        os._exit(1)
