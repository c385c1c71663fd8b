"""Save checkpoints so that a crash at any moment leaves a sound one, and load them back."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from megarec.checkpoint import dcp, manifest
from megarec.checkpoint.atomic import TEMPORARY, beside, discard, fsync_folder, write_atomic
from megarec.checkpoint.ranks import Ranks
from megarec.checkpoint.resolve import LATEST, newest_verified, step_folder_name, step_folders
from megarec.config.schema import CheckpointConfig
from megarec.errors import UserError
from megarec.train.faults import fault

STATE = "state.json"

logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint could not be saved; those before it are as they were."""


class CheckpointManager:
    """The checkpoints of a run. Every method is collective.

    A step folder appears under its final name only when it is complete: shards are written into
    ``step_X.tmp-*``, every rank reports, rank 0 writes the manifest, renames, then moves `latest`.
    `folder` belongs to this run alone (its lock is held): what crashed saves left is swept.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, config_hash: str = "") -> None:
        self.folder = folder
        self._config = config
        self._config_hash = config_hash
        self._ranks = Ranks()
        self._verified: Path | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._ranks.first(self._sweep)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Publish a checkpoint of `tensors` and rank 0's `state` (JSON data), then drop old ones.

        With ``asynchronous: true`` it returns once the tensors are copied to CPU memory and
        publishes from a thread. Raises CheckpointError on all ranks when any of them fails, here or
        in the background save before this one; then this one is not begun.
        """
        self.wait()
        text = json.dumps(state)
        if self._config.asynchronous:
            copies = {
                name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()
            }
            self._pending = self._executor.submit(self._publish, step, copies, text)
        else:
            self._publish(step, tensors, text)

    def wait(self) -> None:
        """Return when no save is under way. Raises the CheckpointError of a background save."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> Path | None:
        """Return the newest sound step folder, or None in a new run; see ``newest_verified``."""
        newest = self._ranks.first(self._newest)
        self._verified = None if newest is None else Path(newest)
        return self._verified

    def load(self, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fill `tensors` in place from a step folder and return the state saved with them.

        Raises UserError, before any tensor changes, when the folder is damaged or holds another
        model. It never falls back to another folder.
        """
        if folder != self._verified:
            problems = self._ranks.first(lambda: manifest.verify(folder, self._config.verify))
            if problems:
                raise UserError(*problems)
        dcp.read(folder, tensors, self._ranks.group)
        state: dict[str, Any] = self._ranks.first(
            lambda: json.loads((folder / STATE).read_text(encoding="utf-8"))
        )
        return state

    def _sweep(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"*{TEMPORARY}*"):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()

    def _newest(self) -> str | None:
        newest = newest_verified(self.folder, self._config.verify)
        return None if newest is None else str(newest)

    def _publish(self, step: int, tensors: Mapping[str, Tensor], state: str) -> None:
        ranks = self._ranks
        final = self.folder / step_folder_name(step)
        temporary = Path(ranks.first(lambda: str(beside(final))))
        try:
            ranks.first(temporary.mkdir)
            dcp.write(temporary, tensors, ranks.group)
            ranks.agree(lambda: fault("ckpt_shard_written", step))
            shares = ranks.agree(lambda: self._describe_share(temporary, step))
            entries = [entry for share in shares for entry in share]
            ranks.first(lambda: self._finish(step, temporary, final, entries, state))
        except UserError as error:
            if ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            where = f"checkpoint of step {step} in {self.folder} was not saved"
            raise CheckpointError(*(f"{where}: {line}" for line in error.lines)) from error
        self._verified = final
        if ranks.rank == 0:
            self._drop_old(step)

    def _describe_share(self, temporary: Path, step: int) -> list[manifest.Entry]:
        # The ranks share the hashing: the files, sorted, are in the order of their writers.
        fault("ckpt_before_manifest", step)
        shards = sorted(temporary.glob("*.safetensors"))[self._ranks.rank :: self._ranks.size]
        return [manifest.describe_file(shard) for shard in shards]

    def _finish(
        self, step: int, temporary: Path, final: Path, entries: list[manifest.Entry], state: str
    ) -> None:
        write_atomic(temporary / STATE, state)
        manifest.write(
            temporary,
            [*entries, manifest.describe_file(temporary / STATE)],
            step=step,
            world_size=self._ranks.size,
            config_hash=self._config_hash,
        )
        fault("ckpt_before_rename", step)
        if final.exists():
            # Damaged, and passed over when the run resumed; or saved twice at the same step.
            replaced = beside(final)
            os.rename(final, replaced)
            os.rename(temporary, final)
            shutil.rmtree(replaced)
        else:
            os.rename(temporary, final)
        fsync_folder(self.folder)
        fault("ckpt_after_rename", step)
        write_atomic(self.folder / LATEST, final.name + "\n")

    def _drop_old(self, saved: int) -> None:
        folders = step_folders(self.folder)
        every = self._config.keep_every
        kept = {saved, *list(folders)[-self._config.keep_last :]}
        for step, folder in folders.items():
            if step in kept or (every is not None and step % every == 0):
                continue
            try:
                discard(folder)
            except OSError as error:
                logger.warning("%s: old checkpoint not deleted: %s", folder, error)
