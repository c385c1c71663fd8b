"""Token shards in megatron-core's indexed format: one item is one document, ending in one EOD."""

import logging
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megarec.data.manifest import (
    MANIFEST,
    Manifest,
    ShardInfo,
    file_info,
    read_manifest,
    write_manifest,
)
from megarec.data.tokenizer import Tokenizer
from megarec.errors import UserError

DEFAULT_SHARD_TOKENS = 1 << 30


@cache
def _indexed_dataset() -> ModuleType:
    # The import takes seconds, warns of optional GPU packages that data do not need, and logs
    # every file it opens.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    logging.getLogger(indexed_dataset.__name__).setLevel(logging.WARNING)
    module: ModuleType = indexed_dataset
    return module


class ShardWriter:
    """Write documents into an empty folder; ``close`` writes the manifest and returns it.

    A shard is closed once it holds ``shard_tokens`` tokens; a document is never split.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, *, shard_tokens: int = DEFAULT_SHARD_TOKENS
    ) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.shard_tokens = shard_tokens
        # megatron-core's own choice, made here so that bad input is reported before its import.
        self.dtype: Literal["uint16", "int32"] = (
            "uint16" if tokenizer.vocab_size < 65500 else "int32"
        )
        self.text_bytes = 0
        self.empty_documents = 0
        self.max_id = 0
        self._shards: list[ShardInfo] = []
        self._builder: Any = None
        self._tokens = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, ids: Sequence[int] | npt.NDArray[np.int32], text_bytes: int) -> None:
        """Append a document without its EOD; an empty one is dropped and counted."""
        import torch

        if len(ids) == 0:
            self.empty_documents += 1
            return
        if self._builder is None:
            self._builder = _indexed_dataset().IndexedDatasetBuilder(
                str(self._path("bin")), dtype=np.dtype(self.dtype).type
            )
        tokens = np.append(np.asarray(ids, dtype=np.int32), np.int32(self.tokenizer.eod_id))
        self._builder.add_item(torch.from_numpy(tokens))
        self._builder.end_document()
        self._tokens += len(tokens)
        self.text_bytes += text_bytes
        self.max_id = max(self.max_id, int(tokens.max()))
        if self._tokens >= self.shard_tokens:
            self._close_shard()

    def close(self) -> Manifest:
        """Close the last shard, write the manifest and return it."""
        if self._builder is not None:
            self._close_shard()
        manifest = Manifest(
            documents=sum(shard.documents for shard in self._shards),
            tokens=sum(shard.tokens for shard in self._shards),
            text_bytes=self.text_bytes,
            max_id=self.max_id,
            vocab_size=self.tokenizer.vocab_size,
            eod_id=self.tokenizer.eod_id,
            tokenizer=self.tokenizer.name,
            tokenizer_hash=self.tokenizer.hash,
            dtype=self.dtype,
            shards=tuple(self._shards),
        )
        write_manifest(self.folder, manifest)
        return manifest

    def _path(self, suffix: str) -> Path:
        return self.folder / f"shard_{len(self._shards):05d}.{suffix}"

    def _close_shard(self) -> None:
        self._builder.finalize(str(self._path("idx")))
        shard = ShardInfo(
            documents=len(self._builder.sequence_lengths),
            tokens=self._tokens,
            bin=file_info(self._path("bin")),
            idx=file_info(self._path("idx")),
        )
        self._shards.append(shard)
        self._builder = None
        self._tokens = 0


class ShardFolder:
    """The documents of a folder of shards, memory-mapped.

    ``lengths`` is int64 (documents,): tokens of each document, its EOD included. Raises UserError
    when the manifest, or a file it lists, is missing or does not have its size.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        problems = _size_problems(self.path, self.manifest)
        if problems:
            raise UserError(*problems)
        open_shard = _indexed_dataset().IndexedDataset
        self._shards = [
            open_shard(str((self.path / shard.bin.name).with_suffix("")))
            for shard in self.manifest.shards
        ]
        lengths = [np.asarray(shard.sequence_lengths, dtype=np.int64) for shard in self._shards]
        self.lengths: npt.NDArray[np.int64] = np.concatenate([np.empty(0, np.int64), *lengths])
        self._first = np.cumsum([0] + [len(shard) for shard in self._shards])
        if int(self.lengths.sum()) != self.manifest.tokens:
            raise UserError(
                f"{self.path}: the .idx files count {self.lengths.sum()} tokens, {MANIFEST} "
                f"{self.manifest.tokens}; run data_prep/verify.py on it"
            )

    def read(self, document: int, start: int, stop: int) -> npt.NDArray[np.integer[Any]]:
        """Return tokens [start, stop) of a document, uint16 or int32, without copying them."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        tokens: npt.NDArray[np.integer[Any]] = self._shards[shard].get(
            int(document - self._first[shard]), offset=start, length=stop - start
        )
        return tokens


def _size_problems(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    for info in (file for shard in manifest.shards for file in (shard.bin, shard.idx)):
        path = folder / info.name
        if not path.is_file():
            problems.append(f"{path}: missing shard file; restore it or make the shards again")
        elif path.stat().st_size != info.size:
            problems.append(
                f"{path}: {path.stat().st_size} bytes, expected {info.size} ({MANIFEST}); "
                "truncated or replaced: restore it or make the shards again"
            )
    return problems
