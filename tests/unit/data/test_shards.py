"""Shards: round trip through megatron's reader, manifests, every kind of damage."""

import json
from pathlib import Path

import numpy as np
import pytest

from megarec.data.manifest import BLOCK_BYTES, read_manifest, write_manifest
from megarec.data.shards import ShardFolder, ShardWriter
from megarec.data.tokenizer import Tokenizer
from megarec.data.verify import verify_folder
from megarec.errors import UserError

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6], [7, 8, 9, 10]]
EOD = 256


def test_megatron_reads_what_we_write(make_shards, tmp_path: Path) -> None:
    make_shards(DOCUMENTS)
    # Here and not above, where its import would print warnings.
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(tmp_path / "shards" / "shard_00000"))
    stored = [dataset[i].tolist() for i in range(len(dataset))]
    assert stored == [[*document, EOD] for document in DOCUMENTS if document]
    assert dataset.index.dtype is np.uint16
    # One sequence a document, as megatron's own preprocessing writes them.
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_reader_over_several_shards(make_shards) -> None:
    folder = make_shards(DOCUMENTS, shard_tokens=5)
    assert [shard.documents for shard in folder.manifest.shards] == [2, 2]
    assert folder.lengths.tolist() == [4, 2, 3, 5]
    assert folder.read(1, 0, 2).tolist() == [4, EOD]
    assert folder.read(3, 1, 3).tolist() == [8, 9]
    manifest = folder.manifest
    assert (manifest.documents, manifest.tokens, manifest.text_bytes) == (4, 14, 10)
    assert (manifest.max_id, manifest.vocab_size, manifest.eod_id) == (EOD, 257, EOD)
    assert verify_folder(folder.path) == manifest


def test_empty_documents_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    writer = ShardWriter(tmp_path / "s", tokenizer)
    writer.add([], 0)
    assert (writer.close().documents, writer.empty_documents) == (0, 1)
    assert ShardFolder(tmp_path / "s").lengths.tolist() == []


def test_missing_and_truncated_files_are_refused_together(make_shards) -> None:
    path = make_shards(DOCUMENTS, shard_tokens=5).path
    (path / "shard_00000.bin").write_bytes((path / "shard_00000.bin").read_bytes()[:-1])
    (path / "shard_00001.idx").unlink()
    with pytest.raises(UserError) as caught:
        ShardFolder(path)
    truncated, missing = caught.value.lines
    assert "shard_00000.bin: 11 bytes, expected 12" in truncated
    assert "shard_00001.idx: missing" in missing


def test_bad_manifests(make_shards, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no manifest.json"):
        ShardFolder(tmp_path / "nowhere")
    path = make_shards(DOCUMENTS).path / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"tokens": "many"}))
    with pytest.raises(UserError, match="malformed .*tokens"):
        ShardFolder(path.parent)
    path.write_text(json.dumps(content | {"tokens": 13}))
    with pytest.raises(UserError, match="count 14 tokens, manifest.json 13"):
        ShardFolder(path.parent)
    path.write_text(path.read_text()[:50])
    with pytest.raises(UserError, match="malformed"):
        ShardFolder(path.parent)


def test_verify_names_file_and_offset(make_shards) -> None:
    path = make_shards([[7] * (BLOCK_BYTES + 5), [1, 2]]).path
    file = path / "shard_00000.bin"
    content = bytearray(file.read_bytes())
    content[BLOCK_BYTES + 3] ^= 1
    file.write_bytes(content)
    ShardFolder(path)  # opening checks sizes only
    with pytest.raises(UserError, match=rf"shard_00000.bin: damaged .* offset {BLOCK_BYTES} "):
        verify_folder(path)
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match="shard_00000.bin: damaged"):
        verify_folder(path)
    file.unlink()
    with pytest.raises(UserError, match="shard_00000.bin: missing"):
        verify_folder(path)


def test_verify_checks_tokens_against_the_manifest(make_shards, tokenizer: Tokenizer) -> None:
    folder = make_shards([[1, 2], [3, EOD, 4]])
    manifest = read_manifest(folder.path)
    write_manifest(folder.path, manifest.model_copy(update={"max_id": 300, "documents": 3}))
    with pytest.raises(UserError) as caught:
        verify_folder(folder.path)
    documents, eod, ids = caught.value.lines
    assert "2 documents, manifest: 3" in documents
    assert "EOD 256 is not at the end of each document" in eod
    assert "largest token id 256, manifest: 300" in ids
