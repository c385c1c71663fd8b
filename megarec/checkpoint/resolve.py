"""Find the checkpoint that a path means."""

import logging
import re
from pathlib import Path

from megarec.checkpoint import manifest
from megarec.checkpoint.manifest import Level
from megarec.errors import UserError

LATEST = "latest"

logger = logging.getLogger(__name__)


def step_folder_name(step: int) -> str:
    """Return ``step_00000100`` for step 100."""
    return f"step_{step:08d}"


def step_folders(checkpoints: Path) -> dict[int, Path]:
    """Return the published step folders by step, oldest first."""
    found = {}
    for path in checkpoints.glob("step_*"):
        match = re.fullmatch(r"step_(\d{8,})", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def newest_verified(checkpoints: Path, level: Level) -> Path | None:
    """Return the newest step folder whose manifest verifies; None where there is no folder.

    Warns, one line each, of the damaged ones that it passes over and of a bad `latest` file.
    Raises UserError when every folder is damaged: a run never starts over unasked.
    """
    folders = step_folders(checkpoints)
    pointer = checkpoints / LATEST
    if pointer.exists():
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if checkpoints / name not in folders.values():
            logger.warning("%s: names %r, which is no step folder here; ignored", pointer, name)
    damaged = []
    for folder in reversed(folders.values()):
        problems = manifest.verify(folder, level)
        if not problems:
            return folder
        logger.warning("DAMAGED CHECKPOINT %s: trying the one before", "; ".join(problems))
        damaged += problems
    if damaged:
        raise UserError(
            *damaged, f"{checkpoints}: no checkpoint is sound; restore one, or name a new run"
        )
    return None


def resolve_checkpoint(path: Path, level: Level = "auto") -> Path:
    """Return the step folder that `path` means: itself, or the newest sound one of a run folder.

    Raises UserError, naming the file, for a damaged step folder, and where there is none.
    """
    if re.fullmatch(r"step_\d{8,}", path.name):
        problems = manifest.verify(path, level)
        if problems:
            raise UserError(*problems)
        return path
    newest = newest_verified(path / "checkpoints", level)
    if newest is None:
        raise UserError(
            f"checkpoint {path}: expected a run folder (with checkpoints/step_00000100/ in it) or "
            "a step folder"
        )
    return newest
