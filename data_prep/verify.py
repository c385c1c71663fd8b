"""Check folders of token shards, byte by byte: verify.py DIR..."""

# ruff: noqa: E402

import os
import sys

# tokenize.py has the name of a standard module: this folder must not be searched for imports.
HERE = os.path.realpath(os.path.dirname(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != HERE]

import argparse
from pathlib import Path

from megarec.cli import run
from megarec.data.verify import verify_folder
from megarec.errors import UserError


def main() -> None:
    """Verify each folder; report the sound ones, then all problems."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders with a manifest.json")
    problems: list[str] = []
    for folder in parser.parse_args().folders:
        try:
            manifest = verify_folder(folder)
        except UserError as error:
            problems += error.lines
        else:
            counts = f"{manifest.documents:,} documents, {manifest.tokens:,} tokens"
            print(f"{folder}: ok, {counts}, {len(manifest.shards)} shards")
    if problems:
        raise UserError(*problems)


if __name__ == "__main__":
    run(main)
