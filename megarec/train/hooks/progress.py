"""The progress bar on a terminal, or a line now and then where there is none."""

import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from megarec.train.hooks import Hook

if TYPE_CHECKING:
    from megarec.train.trainer import Trainer

LINE_EVERY_SECONDS = 10.0


class Progress(Hook):
    """Shows step, loss, bits per byte, tokens/s and the time that is left."""

    def on_start(self, trainer: "Trainer") -> None:
        """Open the bar where the run stands."""
        self._console = Console(file=sys.stderr)
        self._began = self._last_line = time.monotonic()
        self._first_step = trainer.state.step
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            trainer.config.name,
            total=trainer.config.train.steps,
            completed=trainer.state.step,
            numbers="",
        )
        self._bar.start()

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Advance the bar; without a terminal print a line every ten seconds."""
        numbers = _numbers(record)
        self._bar.update(self._task, completed=trainer.state.step, numbers=numbers)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = now
            step, steps = trainer.state.step, trainer.config.train.steps
            left = (now - self._began) / (step - self._first_step) * (steps - step)
            self._print(f"step {step}/{steps}  {numbers}  {left:.0f} s left")

    def on_evaluation(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Print the held-out figures."""
        figures = "  ".join(
            f"{key.removeprefix('valid/')} {value:.4f}"
            for key, value in record.items()
            if key != "step" and value is not None
        )
        self._print(f"step {record['step']}  held out: {figures}")

    def on_end(self, trainer: "Trainer", outcome: str) -> None:
        """Close the bar."""
        self._bar.stop()
        self._print(f"{outcome} at step {trainer.state.step}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _numbers(record: dict[str, Any]) -> str:
    parts = [f"loss {record['loss']:.4f}"]
    if record["bits_per_byte"] is not None:
        parts.append(f"bits/byte {record['bits_per_byte']:.3f}")
    parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    if record["mfu"] is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    return "  ".join(parts)
