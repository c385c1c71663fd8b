"""Weights & Biases."""

import logging
from typing import TYPE_CHECKING, Any

from megarec.errors import UserError
from megarec.models.init import seed_from
from megarec.train.hooks import Hook
from megarec.train.hooks.jsonl import is_due

if TYPE_CHECKING:
    from megarec.train.trainer import Trainer

log = logging.getLogger(__name__)


class WandbLog(Hook):
    """Logs metrics; where the service fails, training goes on without it."""

    def __init__(self) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "logging.wandb: the package wandb is not installed; pip install 'megarec[log]'"
            ) from error
        self._wandb = wandb
        self._run: Any = None

    def on_start(self, trainer: "Trainer") -> None:
        """Start a run, or go on with the one of this run folder."""
        config = trainer.config
        assert config.logging.wandb is not None
        try:
            self._run = self._wandb.init(
                project=config.logging.wandb.project,
                name=config.name,
                id=f"{seed_from(trainer.folder.path.resolve()):x}",
                resume="allow",
                dir=str(trainer.folder.logs),
                mode=config.logging.wandb.mode,
                config=config.model_dump(),
                settings=self._wandb.Settings(silent=True),
            )
        except self._wandb.Error as error:
            log.warning("wandb could not start (%s); training goes on without it", error)

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Log a training step."""
        if is_due(trainer.config.logging.every, trainer):
            self._log(record)

    def on_evaluation(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Log an evaluation."""
        self._log(record)

    def on_end(self, trainer: "Trainer", outcome: str) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()

    def _log(self, record: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(record, step=record["step"])
        except self._wandb.Error as error:
            log.warning("wandb failed (%s); training goes on without it", error)
            self._run = None
