"""Tiny shard folders for the tests of data."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megarec.data.shards import ShardFolder, ShardWriter
from megarec.data.tokenizer import Tokenizer, load_tokenizer

MakeShards = Callable[..., ShardFolder]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer("byte")


@pytest.fixture
def make_shards(tmp_path: Path, tokenizer: Tokenizer) -> MakeShards:
    """Write documents (without EOD) of byte ids into a folder and open it."""

    def make(
        documents: Sequence[Sequence[int]], name: str = "shards", shard_tokens: int = 1 << 20
    ) -> ShardFolder:
        writer = ShardWriter(tmp_path / name, tokenizer, shard_tokens=shard_tokens)
        for document in documents:
            writer.add(document, len(document))
        writer.close()
        return ShardFolder(tmp_path / name)

    return make
