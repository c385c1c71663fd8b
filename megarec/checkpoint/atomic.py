"""Small files and folders that appear whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"
"""What marks the name of a file or folder that is not finished, or is being deleted."""


def beside(path: Path) -> Path:
    """Return a new temporary name next to `path`, marked by ``TEMPORARY``."""
    return path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex[:8]}")


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename survives a crash only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Write a small UTF-8 file so that readers see the old text or the new, never a part.

    Raises OSError; the file is then as it was before.
    """
    temporary = beside(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


@contextmanager
def published(final: Path) -> Iterator[Path]:
    """Give an empty folder beside `final` that takes its name, and place, if the block succeeds.

    Raises OSError; `final` is then as it was before.
    """
    temporary = beside(final)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if final.exists():
            discard(final)
        os.rename(temporary, final)
        fsync_folder(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a folder. Its name goes first, so that a crash leaves no half folder under it."""
    doomed = beside(folder)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
