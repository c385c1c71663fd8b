"""The manifest of a shard folder: what it holds, made with which tokenizer, and checksums."""

import zlib
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from megarec.config.base import NonNegativeInt, PositiveInt, StrictModel
from megarec.errors import UserError

MANIFEST = "manifest.json"
BLOCK_BYTES = 1 << 20
"""Each checksum covers one block of this many bytes, so that damage can be located."""


class FileInfo(StrictModel):
    """A file of a shard: its size in bytes, and the crc32 of each block of 1 MiB."""

    name: str
    size: NonNegativeInt
    crc32: tuple[NonNegativeInt, ...]


class ShardInfo(StrictModel):
    """One shard: megatron-core's `.bin` (tokens) and `.idx` (document lengths)."""

    documents: PositiveInt
    tokens: PositiveInt
    bin: FileInfo
    idx: FileInfo


class Manifest(StrictModel):
    """A shard folder. `tokens` counts EODs; `text_bytes` is UTF-8 text, for bits per byte."""

    format_version: Literal[1] = 1
    documents: NonNegativeInt
    tokens: NonNegativeInt
    text_bytes: NonNegativeInt
    max_id: NonNegativeInt
    vocab_size: PositiveInt
    eod_id: NonNegativeInt
    tokenizer: str
    tokenizer_hash: str
    dtype: Literal["uint16", "int32"]
    shards: tuple[ShardInfo, ...]

    @property
    def checksum(self) -> str:
        """A hash of everything the shards hold, wherever the folder lies."""
        shards = "".join(shard.model_dump_json() for shard in self.shards)
        return blake2b(shards.encode(), digest_size=16).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest; raises UserError when it is missing or malformed."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder}: no {MANIFEST}; expected a folder of shards written by data_prep/tokenize.py"
        )
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path}: malformed ({where or 'json'}: {first['msg']}); make the shards again"
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a folder's manifest."""
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")


def block_checksums(path: Path) -> list[int]:
    """Return the crc32 of each block of a file."""
    with path.open("rb") as file:
        return [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK_BYTES), b"")]


def file_info(path: Path) -> FileInfo:
    """Describe a file as the manifest does."""
    return FileInfo(name=path.name, size=path.stat().st_size, crc32=tuple(block_checksums(path)))
