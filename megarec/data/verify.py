"""Check a shard folder against its manifest: checksums first, then what the tokens say."""

from pathlib import Path

import numpy as np

from megarec.data.manifest import BLOCK_BYTES, FileInfo, Manifest, block_checksums, read_manifest
from megarec.data.shards import ShardFolder
from megarec.errors import UserError

CHUNK_TOKENS = 1 << 24


def verify_folder(folder: Path) -> Manifest:
    """Return the manifest of a sound folder; raises UserError with a line for each problem.

    Files are compared block by block, and the first damaged block of each is named by its byte
    offset. Sound files must hold the counts and ids of the manifest, and one EOD at the end of
    each document and nowhere else.
    """
    manifest = read_manifest(folder)
    files = [info for shard in manifest.shards for info in (shard.bin, shard.idx)]
    problems = [line for info in files for line in _file_problems(folder / info.name, info)]
    problems = problems or _token_problems(ShardFolder(folder))
    if problems:
        raise UserError(*problems)
    return manifest


def _file_problems(path: Path, info: FileInfo) -> list[str]:
    if not path.is_file():
        return [f"{path}: missing; restore it or make the shards again"]
    found = block_checksums(path)
    for block, expected in enumerate(info.crc32):
        if block >= len(found) or found[block] != expected:
            return [
                f"{path}: damaged in the block at byte offset {block * BLOCK_BYTES} "
                f"(of {BLOCK_BYTES} bytes); restore it or make the shards again"
            ]
    size = path.stat().st_size
    return [] if size == info.size else [f"{path}: {size} bytes, expected {info.size}"]


def _token_problems(folder: ShardFolder) -> list[str]:
    manifest = folder.manifest
    problems = []
    if len(folder.lengths) != manifest.documents:
        problems.append(
            f"{folder.path}: {len(folder.lengths)} documents, manifest: {manifest.documents}"
        )
    max_id = 0
    first = 0
    for shard in manifest.shards:
        path = folder.path / shard.bin.name
        tokens = np.memmap(path, dtype=manifest.dtype, mode="r")
        eods = []
        for start in range(0, len(tokens), CHUNK_TOKENS):
            chunk = tokens[start : start + CHUNK_TOKENS]
            max_id = max(max_id, int(chunk.max()))
            eods.append(start + np.flatnonzero(chunk == manifest.eod_id))
        stops = np.cumsum(folder.lengths[first : first + shard.documents])
        first += shard.documents
        if not np.array_equal(np.concatenate(eods), stops - 1):
            problems.append(f"{path}: EOD {manifest.eod_id} is not at the end of each document")
    if max_id != manifest.max_id or max_id >= manifest.vocab_size:
        problems.append(
            f"{folder.path}: largest token id {max_id}, manifest: {manifest.max_id} of "
            f"{manifest.vocab_size} ids"
        )
    return problems
