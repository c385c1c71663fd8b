"""Plots of logged metrics: what is drawn, and a metric that is not there."""

import json
from pathlib import Path

import pytest

from megarec.errors import UserError
from megarec.train.hooks.plot import plot_metrics


def test_metrics_of_several_runs(tmp_path: Path) -> None:
    metrics = {}
    for name in ("one", "two"):
        records = [{"step": s, "residual": 10.0 ** -(s % 7), "iterations": 3} for s in range(20)]
        metrics[name] = tmp_path / f"{name}.jsonl"
        metrics[name].write_text("".join(json.dumps(record) + "\n" for record in records))
    one, both = tmp_path / "one.png", tmp_path / "both.png"
    plot_metrics(metrics, ["residual"], one)
    plot_metrics(metrics, ["residual", "iterations"], both)
    assert both.stat().st_size > one.stat().st_size > 5_000
    with pytest.raises(UserError, match="metric 'residuals': not logged; there are iterations"):
        plot_metrics(metrics, ["residuals"], one)
