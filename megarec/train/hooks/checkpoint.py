"""Periodic checkpoints."""

import logging
from typing import TYPE_CHECKING, Any

from megarec.checkpoint.manager import CheckpointError
from megarec.train.hooks import Hook

if TYPE_CHECKING:
    from megarec.train.trainer import Trainer

log = logging.getLogger(__name__)


class Checkpoint(Hook):
    """Saves every `checkpoint.every` steps, on every rank; the trainer saves at the end."""

    main_only = False

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Save when it is due; `checkpoint.on_save_error` says what a failure does."""
        config = trainer.config.checkpoint
        if trainer.state.step % config.every:
            return
        try:
            trainer.save()
        except CheckpointError as error:
            if config.on_save_error == "stop":
                raise
            log.warning("%s; training goes on without this checkpoint", error)
