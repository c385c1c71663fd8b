"""Errors that a user can act on: one line, exit code 2, no traceback."""

EXIT_USER_ERROR = 2
"""Exit code of every command whose input was bad."""

EXIT_PREEMPTED = 75
"""Exit code of a run that saved and stopped on a signal (EX_TEMPFAIL: requeue it)."""


class UserError(Exception):
    """Bad input: what, where, got, expected and what to do, one line an error.

    ``UserError("a", "b")`` reports two errors at once.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class RunError(Exception):
    """A run that cannot go on, for a reason that one line explains; exit code 1."""
