"""Warnings where a looped stack fails as such models do (arXiv 2502.05171, section 4.3)."""

import logging
from typing import TYPE_CHECKING, Any

from megarec.train.hooks import Hook

if TYPE_CHECKING:
    from megarec.train.trainer import Trainer

log = logging.getLogger(__name__)

COLLAPSED, RECOVERED = 0.95, 0.8
"""Mean cosine between tokens above which the latent state says the same of all of them, and below
which it no longer does."""


class LoopMonitor(Hook):
    """Warns when latent states collapse, and when more recurrences do not lower the loss.

    Each once, until it is over; not in the warm-up, when neither means anything yet.
    """

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Look at the correlation of tokens."""
        correlation = record.get("loop/token_correlation", 0.0)
        self._report(
            trainer,
            "collapse",
            correlation > COLLAPSED,
            correlation < RECOVERED,
            f"loop/token_correlation={correlation:.3f}: the latent states of all tokens are nearly "
            "alike; lower the learning rate, or check norms and injection",
        )

    def on_evaluation(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Compare the losses at the smallest and the largest number of recurrences."""
        depths = sorted(trainer.config.evaluation.num_recurrences)
        if len(depths) < 2:
            return
        for source in trainer.config.data.valid:
            few, many = (record[f"valid/{source}/loss_r{r}"] for r in (depths[0], depths[-1]))
            self._report(
                trainer,
                f"unused {source}",
                many >= few,
                many < few,
                f"valid/{source}: the loss at {depths[-1]} recurrences, {many:.4f}, is not below "
                f"that at {depths[0]}, {few:.4f}: the model does not use its latent state",
            )

    def _report(
        self, trainer: "Trainer", what: str, fails: bool, is_over: bool, message: str
    ) -> None:
        warming_up = trainer.state.step <= trainer.config.schedule.warmup_steps
        if is_over:
            self._warned.discard(what)
        elif fails and not warming_up and what not in self._warned:
            self._warned.add(what)
            log.warning("step %d: %s", trainer.state.step, message)
