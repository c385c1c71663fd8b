"""What the command-line scripts share: one-line errors, and output folders published whole."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from megarec.checkpoint.atomic import published
from megarec.config.base import StrictModel
from megarec.config.loader import apply_override, config_errors
from megarec.errors import EXIT_USER_ERROR, UserError

S = TypeVar("S", bound=StrictModel)


def run(main: Callable[[], None]) -> None:
    """Run a script; bad input and file errors print one line each and exit with code 2.

    ``MEGAREC_DEBUG=1`` shows the traceback instead.
    """
    try:
        main()
    except (UserError, OSError) as error:
        if os.environ.get("MEGAREC_DEBUG") == "1":
            raise
        print_error(error)
        sys.exit(EXIT_USER_ERROR)


def print_error(error: Exception) -> None:
    """Print an error's lines to stderr, each marked as one."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)


def fraction(text: str) -> float:
    """Parse an argument between 0 and 1, both excluded."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number between 0 and 1")
    return value


def positive_int(text: str) -> int:
    """Parse an argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, at least 1")
    return int(text)


def named_settings(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Split `NAME key=value ...` into the name and a tree of settings; a value is YAML."""
    name, *overrides = words
    settings: dict[str, Any] = {}
    for override in overrides:
        apply_override(settings, override)
    return name, settings


def validated(config: type[S], settings: dict[str, Any], where: str) -> S:
    """Make a config of settings; `where` names their origin in errors (UserError)."""
    try:
        return config.model_validate(settings)
    except ValidationError as error:
        raise UserError(*config_errors(error, settings, config, where)) from None


@contextmanager
def new_folder(out: Path, *, force: bool, contents: Sequence[str]) -> Iterator[Path]:
    """Give a temporary folder beside ``out`` that takes its name when the block succeeds.

    A non-empty ``out`` is replaced only with ``force``, and only if every entry in it matches a
    pattern of ``contents``: it then is an earlier output. Raises UserError otherwise.
    """
    out = out.resolve()
    entries = sorted(out.iterdir()) if out.exists() else []
    if entries and not force:
        raise UserError(f"--out {out}: not empty; give another folder, or --force to replace it")
    foreign = [p.name for p in entries if not any(p.match(pattern) for pattern in contents)]
    if foreign:
        raise UserError(f"--out {out}: holds '{foreign[0]}', not ours: --force does not replace it")
    with published(out) as folder:
        yield folder


def check_new_file(out: Path, *, force: bool) -> None:
    """Raise UserError when a file exists and may not be overwritten."""
    if out.exists() and not force:
        raise UserError(f"--out {out}: exists; give another name, or --force to replace it")
