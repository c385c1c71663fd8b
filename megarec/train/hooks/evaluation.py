"""Held-out loss: at the start, every `evaluation.every` steps, and at the end."""

from typing import TYPE_CHECKING, Any

from megarec.train.hooks import Hook

if TYPE_CHECKING:
    from megarec.train.trainer import Trainer


class Evaluation(Hook):
    """Runs on every rank."""

    main_only = False

    def on_start(self, trainer: "Trainer") -> None:
        """Measure the untrained model; a resumed run has done so."""
        if trainer.state.step == 0:
            trainer.evaluate()

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Measure every so many steps, and after the last."""
        step, every = trainer.state.step, trainer.config.evaluation.every
        if step == trainer.config.train.steps or (every is not None and step % every == 0):
            trainer.evaluate()
