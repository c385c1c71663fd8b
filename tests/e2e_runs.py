"""Runs of the trainer in tests: whole sessions on synthetic data, and what they leave behind."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from small import run_config

from megarec.train.hooks import Hook
from megarec.train.hooks.jsonl import read_metrics
from megarec.train.session import Options, run
from megarec.train.trainer import Trainer

STOP_STEP, STOP_RANK, STOP_SIGNAL = 6, 1, signal.SIGUSR1


class StopOneRank(Hook):
    """Sends a signal to one rank alone (the last, if there are fewer) at a step."""

    main_only = False

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Be the scheduler."""
        rank = min(STOP_RANK, trainer.env.world_size - 1)
        if trainer.state.step == STOP_STEP and trainer.env.rank == rank:
            os.kill(os.getpid(), STOP_SIGNAL)


def session(
    runs: Path, name: str, *, resume: Path | None = None, force: bool = False, **sections: Any
) -> int:
    """Run a session of the tiny recipe to its end; returns the exit code."""
    return run(run_config(name, **sections), Options(runs, resume, force))


def losses(runs: Path, name: str) -> list[float]:
    """Return the training losses that a run has logged, one a step."""
    return [r["loss"] for r in read_metrics(runs / name / "metrics.jsonl") if "loss" in r]


def held_out(runs: Path, name: str) -> list[float]:
    """Return the held-out losses that a run has logged."""
    records = read_metrics(runs / name / "metrics.jsonl")
    return [r["valid/hmm/loss"] for r in records if "valid/hmm/loss" in r]


def status(runs: Path, name: str) -> dict[str, Any]:
    """Return the run's status.json."""
    return json.loads((runs / name / "status.json").read_text())
