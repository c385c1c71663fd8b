"""Publishing, retention, and falling back: one process, every kind of damage."""

import json
from pathlib import Path

import pytest
import torch

from megarec.checkpoint import manager as manager_module
from megarec.checkpoint.manager import CheckpointError, CheckpointManager
from megarec.config.schema import CheckpointConfig
from megarec.errors import UserError


def open_manager(folder: Path, **config: object) -> CheckpointManager:
    return CheckpointManager(folder, CheckpointConfig(**config), config_hash="c0ffee")


def save(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        manager.save(step, {"x": torch.full((3,), float(step))}, {"step": step, "loss": 0.1})


def warnings_of_megarec(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("megarec")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def load(manager: CheckpointManager, folder: Path) -> float:
    x = torch.zeros(3)
    state = manager.load(folder, {"x": x})
    assert state == {"step": int(x[0]), "loss": 0.1}
    return x[0].item()


def test_a_published_folder_is_complete(tmp_path: Path):
    manager = open_manager(tmp_path / "run" / "checkpoints")
    assert manager.latest() is None
    save(manager, 100)
    folder = manager.latest()
    assert folder == tmp_path / "run" / "checkpoints" / "step_00000100"
    assert (folder.parent / "latest").read_text() == "step_00000100\n"
    assert names(folder.parent) == ["latest", "step_00000100"]
    content = json.loads((folder / "manifest.json").read_text())
    assert (content["step"], content["world_size"], content["config_hash"]) == (100, 1, "c0ffee")
    assert [entry["file"] for entry in content["files"]] == [
        path for path in names(folder) if path != "manifest.json"
    ][:2]
    assert load(manager, folder) == 100


def test_retention_keeps_the_last_and_every_nth(tmp_path: Path):
    manager = open_manager(tmp_path, keep_last=2, keep_every=30)
    save(manager, 10, 20, 30, 40, 50, 60, 70)
    assert names(tmp_path) == [
        "latest",
        "step_00000030",
        "step_00000060",
        "step_00000070",
    ]


def test_retention_never_deletes_what_was_just_saved(tmp_path: Path):
    manager = open_manager(tmp_path, keep_last=2)
    save(manager, 100, 200, 10)
    assert names(tmp_path) == ["latest", "step_00000010", "step_00000100", "step_00000200"]


def test_a_failed_save_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    manager = open_manager(tmp_path, keep_last=2)
    save(manager, 1, 2)
    monkeypatch.setenv("MEGAREC_FAULT", "ckpt_before_rename:3:0:enospc")
    with pytest.raises(CheckpointError, match="checkpoint of step 3 .* No space left on device"):
        save(manager, 3)
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002"]
    save(manager, 4)
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000004"]


def test_a_folder_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manager_module, "discard", refuse)
    manager = open_manager(tmp_path, keep_last=2)
    save(manager, 1, 2, 3)
    assert "step_00000001: old checkpoint not deleted" in caplog.text
    assert load(manager, manager.latest()) == 3


def test_leftovers_are_swept_at_the_start(tmp_path: Path):
    (tmp_path / "step_00000003.tmp-0123").mkdir()
    (tmp_path / "step_00000003.tmp-0123" / "shard").touch()
    (tmp_path / "latest.tmp-4567").touch()
    (tmp_path / "notes").touch()
    open_manager(tmp_path)
    assert names(tmp_path) == ["notes"]


def test_a_step_saved_again_replaces_the_damaged_one(tmp_path: Path):
    manager = open_manager(tmp_path)
    save(manager, 1, 2)
    (tmp_path / "step_00000002" / "state.json").write_text("")
    assert manager.latest().name == "step_00000001"
    save(manager, 2)
    assert load(manager, manager.latest()) == 2
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002"]


def shard(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "shard short by a byte": lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-1]),
    "shard empty": lambda f: shard(f).write_bytes(b""),
    "byte flipped": lambda f: flip(shard(f)),
    "shard deleted": lambda f: shard(f).unlink(),
    "state flipped": lambda f: flip(f / "state.json"),
    "manifest short": lambda f: (f / "manifest.json").write_text("{"),
    "manifest deleted": lambda f: (f / "manifest.json").unlink(),
}
FILE = {"state flipped": "state.json", "manifest short": "manifest.json"}
FILE["manifest deleted"] = "manifest.json"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_falls_back_with_a_warning_but_not_when_explicit(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    save(open_manager(tmp_path), 1, 2)
    bad = tmp_path / "step_00000002"
    DAMAGE[damage](bad)
    manager = open_manager(tmp_path)
    assert load(manager, manager.latest()) == 1
    (message,) = warnings_of_megarec(caplog)
    assert str(bad / FILE.get(damage, "shard-00001")) in message and "\n" not in message
    x = torch.zeros(3)
    with pytest.raises(UserError, match=FILE.get(damage, "shard-00001")):
        manager.load(bad, {"x": x})
    assert x.tolist() == [0, 0, 0]


@pytest.mark.parametrize("text", ["step_00000009\n", "", "\x00garbage"])
def test_a_bad_latest_file_is_named_and_ignored(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    save(open_manager(tmp_path), 1, 2)
    (tmp_path / "latest").write_text(text)
    manager = open_manager(tmp_path)
    assert load(manager, manager.latest()) == 2
    (message,) = warnings_of_megarec(caplog)
    assert f"{tmp_path / 'latest'}: names" in message


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(tmp_path: Path):
    save(open_manager(tmp_path), 1)
    shard(tmp_path / "step_00000001").unlink()
    with pytest.raises(UserError, match="no checkpoint is sound"):
        open_manager(tmp_path).latest()


def test_a_background_error_surfaces_at_the_next_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    manager = open_manager(tmp_path, asynchronous=True)
    save(manager, 1)
    monkeypatch.setenv("MEGAREC_FAULT", "ckpt_shard_written:2:0:enospc")
    save(manager, 2)
    with pytest.raises(CheckpointError, match="step 2"):
        save(manager, 3)
    manager.wait()
    assert manager.latest().name == "step_00000001"


def test_a_background_save_writes_what_the_tensors_were(tmp_path: Path):
    manager = open_manager(tmp_path, asynchronous=True)
    x, state = torch.ones(3), {"step": 1, "loss": 0.1}
    manager.save(1, {"x": x}, state)
    x.zero_()
    state["step"] = 5
    manager.wait()
    assert load(manager, manager.latest()) == 1


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory"):
        open_manager(tmp_path / "file" / "checkpoints")
