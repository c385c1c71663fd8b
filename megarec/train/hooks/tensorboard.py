"""TensorBoard."""

from typing import TYPE_CHECKING, Any

from megarec.errors import UserError
from megarec.train.hooks import Hook
from megarec.train.hooks.jsonl import is_due

if TYPE_CHECKING:
    from megarec.train.trainer import Trainer


class TensorBoardLog(Hook):
    """Writes scalars to logs/tensorboard/."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "logging.tensorboard: the package tensorboard is not installed; "
                "pip install 'megarec[log]'"
            ) from error
        self._writer_class = SummaryWriter

    def on_start(self, trainer: "Trainer") -> None:
        """Open the event file; steps that will be made again are hidden."""
        folder = str(trainer.folder.logs / "tensorboard")
        self._writer = self._writer_class(folder, purge_step=trainer.state.step + 1)

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Write a training step."""
        if is_due(trainer.config.logging.every, trainer):
            self._write(record)

    def on_evaluation(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Write an evaluation."""
        self._write(record)

    def on_end(self, trainer: "Trainer", outcome: str) -> None:
        """Close the event file."""
        self._writer.close()

    def _write(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, record["step"])
