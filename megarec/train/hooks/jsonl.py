"""metrics.jsonl: one JSON object a line, for training steps and evaluations."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarec.checkpoint.atomic import write_atomic
from megarec.train.hooks import Hook

if TYPE_CHECKING:
    from megarec.train.trainer import Trainer


class JsonlLog(Hook):
    """Appends records. After a resume, lines of steps that will be made again are dropped."""

    def on_start(self, trainer: "Trainer") -> None:
        """Forget what a run that died had logged beyond its last checkpoint."""
        path, last = trainer.folder.metrics, trainer.state.step
        if path.exists():
            kept = [json.dumps(r) for r in read_metrics(path) if r["step"] <= last]
            write_atomic(path, "".join(line + "\n" for line in kept))

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Log every `logging.every` steps, and the last."""
        if is_due(trainer.config.logging.every, trainer):
            self._append(trainer.folder.metrics, record)

    def on_evaluation(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Log every evaluation."""
        self._append(trainer.folder.metrics, record)

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def is_due(every: int, trainer: "Trainer") -> bool:
    """Tell whether something due every so many steps is due after this one, or it is the last."""
    step = trainer.state.step
    return step % every == 0 or step == trainer.config.train.steps


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl; a last line cut off by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records
