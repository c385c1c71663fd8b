"""manifest.json: what a step folder holds, so that a damaged one is recognised."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypedDict

import megarec
from megarec.checkpoint.atomic import write_atomic

NAME = "manifest.json"
FULL_BELOW_BYTES = 10 * 10**9
"""Up to this size, `auto` reads every byte; above, it compares sizes only."""

Level = Literal["auto", "full", "size"]


class Entry(TypedDict):
    """One file: its name, its size, and the blake2b hash (64 bytes, hex) of its content."""

    file: str
    bytes: int
    blake2b: str


def describe_file(path: Path) -> Entry:
    """Read a file and return its entry. Raises OSError."""
    return {"file": path.name, "bytes": path.stat().st_size, "blake2b": _hash_file(path)}


def hash_config(config: dict[str, Any]) -> str:
    """Return a hash of plain config values that does not depend on the order of keys."""
    text = json.dumps(config, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write(
    folder: Path, entries: Iterable[Entry], *, step: int, world_size: int, config_hash: str
) -> None:
    """Write the manifest of a step folder. Raises OSError."""
    manifest = {
        "step": step,
        "world_size": world_size,
        "megarec_version": megarec.__version__,
        "config_hash": config_hash,
        "files": list(entries),
    }
    write_atomic(folder / NAME, json.dumps(manifest, indent=2) + "\n")


def verify(folder: Path, level: Level) -> list[str]:
    """Return what is wrong with a step folder, a line a problem that names the file; [] if sound.

    `size` compares names and sizes, `full` hashes too, `auto` is `full` below 10 GB.
    """
    try:
        entries = _read(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{folder / NAME}: not a readable manifest ({type(error).__name__}: {error})"]
    small = sum(entry["bytes"] for entry in entries) < FULL_BELOW_BYTES
    full = level == "full" or (level == "auto" and small)
    problems = [problem for entry in entries for problem in _check(folder, entry, full)]
    # The reader of shards takes every one it finds.
    listed = {entry["file"] for entry in entries}
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    problems += [f"{folder / name}: not in {NAME}" for name in shards if name not in listed]
    return problems


def _read(folder: Path) -> list[Entry]:
    files = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
    return [
        {"file": str(file["file"]), "bytes": int(file["bytes"]), "blake2b": str(file["blake2b"])}
        for file in files
    ]


def _check(folder: Path, entry: Entry, full: bool) -> list[str]:
    path = folder / entry["file"]
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return [f"{path}: {size} bytes, expected {entry['bytes']}"]
        if full and _hash_file(path) != entry["blake2b"]:
            return [f"{path}: its content has changed since it was written (blake2b differs)"]
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    return []


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
