"""A manifest recognises every damage, and names the file."""

import json
from pathlib import Path

import pytest

import megarec
from megarec.checkpoint import manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.safetensors").write_bytes(b"0123456789")
    (tmp_path / "state.json").write_text("{}")
    entries = [manifest.describe_file(tmp_path / n) for n in ("a.safetensors", "state.json")]
    manifest.write(tmp_path, entries, step=7, world_size=2, config_hash="abc")
    return tmp_path


def test_it_records_where_it_comes_from(folder: Path):
    content = json.loads((folder / "manifest.json").read_text())
    assert {key: content[key] for key in content if key != "files"} == {
        "step": 7,
        "world_size": 2,
        "megarec_version": megarec.__version__,
        "config_hash": "abc",
    }
    assert content["files"][0]["bytes"] == 10
    assert len(content["files"][0]["blake2b"]) == 128


@pytest.mark.parametrize("level", ["size", "full", "auto"])
def test_a_sound_folder_has_no_problems(folder: Path, level: manifest.Level):
    assert manifest.verify(folder, level) == []


def test_a_flipped_byte_needs_the_hash(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "a.safetensors").write_bytes(b"0123456780")
    assert manifest.verify(folder, "size") == []
    for level in ("full", "auto"):
        (problem,) = manifest.verify(folder, level)
        assert "a.safetensors: its content has changed" in problem
    monkeypatch.setattr(manifest, "FULL_BELOW_BYTES", 12)
    assert manifest.verify(folder, "auto") == []


@pytest.mark.parametrize("size", [9, 0, 11])
def test_a_changed_size_is_seen_at_every_level(folder: Path, size: int):
    (folder / "a.safetensors").write_bytes(b"x" * size)
    for level in ("size", "full"):
        (problem,) = manifest.verify(folder, level)
        assert f"a.safetensors: {size} bytes, expected 10" in problem


def test_missing_and_foreign_files_are_named(folder: Path):
    (folder / "state.json").unlink()
    (folder / "b.safetensors").write_bytes(b"")
    problems = manifest.verify(folder, "size")
    assert len(problems) == 2
    assert "state.json: No such file" in problems[0]
    assert "b.safetensors: not in manifest.json" in problems[1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": [1]}', '{"files": [{}]}', "\xff"])
def test_a_bad_manifest_is_named(folder: Path, text: str):
    (folder / "manifest.json").write_bytes(text.encode("latin1"))
    (problem,) = manifest.verify(folder, "size")
    assert "manifest.json: not a readable manifest" in problem


def test_a_missing_manifest_is_named(folder: Path):
    (folder / "manifest.json").unlink()
    (problem,) = manifest.verify(folder, "size")
    assert "manifest.json" in problem and "No such file" in problem


def test_config_hash_depends_on_values_only():
    assert manifest.hash_config({"a": 1, "b": {"c": 2, "d": 3}}) == manifest.hash_config(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert manifest.hash_config({"a": 1}) != manifest.hash_config({"a": 2})
