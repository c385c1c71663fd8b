"""The loss curve as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarec.errors import UserError
from megarec.train.hooks import Hook
from megarec.train.hooks.jsonl import read_metrics

if TYPE_CHECKING:
    from megarec.train.trainer import Trainer


class LossPlot(Hook):
    """Draws plots/loss.png after every evaluation and at the end."""

    def on_evaluation(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Redraw."""
        self.on_end(trainer, "")

    def on_end(self, trainer: "Trainer", outcome: str) -> None:
        """Draw, if there is anything to draw."""
        if trainer.folder.metrics.exists():
            out = trainer.folder.plots / "loss.png"
            plot_loss({trainer.config.name: trainer.folder.metrics}, out)


def plot_loss(metrics: dict[str, Path], out: Path) -> None:
    """Draw the loss curves of runs (name -> metrics.jsonl) to a PNG.

    Bits per byte where the data knows its bytes, else nats a token. A step's own loss is drawn
    faintly, its running mean strongly; dots are held-out evaluations.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    values: list[float] = []
    runs = {name: read_metrics(path) for name, path in metrics.items()}
    known = [r[key] for rs in runs.values() for r in rs for key in r if "bits_per_byte" in key]
    unit = "loss" if None in known else "bits_per_byte"
    for i, (name, records) in enumerate(runs.items()):
        train = [r for r in records if "loss" in r]
        steps, losses = [r["step"] for r in train], [r[unit] for r in train]
        means = _running_mean(losses)
        axes.plot(steps, losses, color=f"C{2 * i}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, means, color=f"C{2 * i}", label=f"{name}, training")
        values += means
        for source in sorted({key for r in records for key in r if key.endswith(f"/{unit}")}):
            points = [(r["step"], r[source]) for r in records if source in r]
            label = f"{name}, held out ({source.split('/')[1]}): {points[-1][1]:.3f}"
            axes.plot(*zip(*points, strict=True), "o-", color=f"C{2 * i + 1}", label=label)
            values += [value for _, value in points]
    if values:
        axes.set_ylim(min(values) * 0.95, max(values) * 1.03)
        axes.legend()
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte" if unit == "bits_per_byte" else "loss, nats per token")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def plot_metrics(metrics: dict[str, Path], names: list[str], out: Path) -> None:
    """Draw metrics of runs (name -> metrics.jsonl) over the steps to a PNG, one below the other.

    An axis is logarithmic where the values span more than two decades.

    Raises:
        UserError: no run has logged a metric; the message names those that are there.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {name: read_metrics(path) for name, path in metrics.items()}
    known = sorted({key for records in runs.values() for record in records for key in record})
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            *(f"metric '{name}': not logged; there are {', '.join(known)}" for name in unknown)
        )
    figure, rows = plt.subplots(
        len(names), figsize=(8, 1 + 3 * len(names)), sharex=True, squeeze=False
    )
    for name, axes in zip(names, rows[:, 0], strict=True):
        drawn: list[float] = []
        for run, records in runs.items():
            points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=run, linewidth=0.9)
                drawn += [value for _, value in points]
        if drawn and min(drawn) > 0 and max(drawn) > 100 * min(drawn):
            axes.set_yscale("log")
        axes.set_ylabel(name)
        axes.legend()
        axes.grid(alpha=0.3)
    rows[-1, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def _running_mean(values: list[float], decay: float = 0.9) -> list[float]:
    """Exponential running mean, corrected for its start."""
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        means.append(total / weight)
    return means
