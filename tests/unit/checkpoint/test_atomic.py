"""Atomic writes leave the old text or the new one, and nothing beside it."""

from pathlib import Path

import pytest

from megarec.checkpoint import atomic


def test_write_replaces_the_text_and_leaves_nothing_beside(tmp_path: Path):
    path = tmp_path / "f.json"
    atomic.write_atomic(path, "old")
    atomic.write_atomic(path, "n\u00e9w")
    assert path.read_bytes() == "n\u00e9w".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "f.json"
    atomic.write_atomic(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        atomic.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_discard_renames_before_it_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    deleted = []
    monkeypatch.setattr(atomic.shutil, "rmtree", deleted.append)
    atomic.discard(folder)
    assert not folder.exists()
    assert deleted == list(tmp_path.iterdir())
    assert deleted[0].name.startswith("step_00000001.tmp-")
