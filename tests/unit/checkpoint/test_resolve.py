"""A path to a run or to a step names one sound checkpoint, or an error."""

from pathlib import Path

import pytest
import torch

from megarec.checkpoint.manager import CheckpointManager
from megarec.checkpoint.resolve import resolve_checkpoint
from megarec.config.schema import CheckpointConfig
from megarec.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    manager = CheckpointManager(tmp_path / "checkpoints", CheckpointConfig())
    for step in (99, 100):
        manager.save(step, {"x": torch.ones(1)}, {})
    return tmp_path


def test_a_run_folder_means_its_newest_sound_step(run: Path):
    assert resolve_checkpoint(run).name == "step_00000100"
    (run / "checkpoints" / "step_00000100" / "state.json").unlink()
    assert resolve_checkpoint(run).name == "step_00000099"


def test_a_step_folder_means_itself_and_must_be_sound(run: Path):
    step = run / "checkpoints" / "step_00000099"
    assert resolve_checkpoint(step) == step
    (step / "state.json").unlink()
    with pytest.raises(UserError, match="state.json"):
        resolve_checkpoint(step)


@pytest.mark.parametrize("name", ["absent", "", "checkpoints/step_00000007"])
def test_no_checkpoint_is_a_user_error(name: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"expected a run folder|manifest\.json"):
        resolve_checkpoint(tmp_path / name)


def test_unfinished_and_foreign_folders_are_no_checkpoints(run: Path):
    for name in ("step_00000200.tmp-1", "step_5", "step_x"):
        (run / "checkpoints" / name).mkdir()
    assert resolve_checkpoint(run).name == "step_00000100"
