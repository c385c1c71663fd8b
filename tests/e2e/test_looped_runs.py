"""Training runs of looped stacks: depth in the log, the same after a resume, and warnings."""

import logging
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from e2e_runs import losses, session
from looped_models import POISSON, looped_tree
from small import run_config

from megarec.config.depth import LognormalPoissonDepth
from megarec.train.hooks.jsonl import read_metrics
from megarec.train.hooks.loop_monitor import LoopMonitor

DEPTH_TOOL = Path(__file__).parents[2] / "tools/depth.py"
DEPTHS = (1, 2, 8)
SECTIONS: dict[str, Any] = {
    "model": looped_tree(depth=POISSON | {"per": "micro_batch"}, backprop=2),
    "parallel": {"activation_checkpointing": "recurrence"},
    "evaluation": {"max_samples": 8, "num_recurrences": DEPTHS},
}


def steps(runs: Path, name: str) -> list[dict[str, Any]]:
    return [r for r in read_metrics(runs / name / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in one session, and in two."""
    folder = tmp_path_factory.mktemp("runs")
    assert session(folder, "whole", **SECTIONS) == 0
    assert session(folder, "parts", **SECTIONS, hooks=["e2e_runs:StopOneRank"]) == 75
    assert session(folder, "parts", **SECTIONS, force=True) == 0
    return folder


def test_a_resumed_run_draws_the_same_depths(runs: Path) -> None:
    assert losses(runs, "parts") == losses(runs, "whole")
    found = [r["loop/recurrences"] for r in steps(runs, "parts")]
    # Micro-batches of 2 make a step of 8 samples: each has drawn its own.
    depth, seed = LognormalPoissonDepth(mean=3), run_config().seed
    draws = [depth.draw(seed, i, 2) for i in range(4 * len(found))]
    assert found == [sum(draws[4 * i : 4 * i + 4]) / 4 for i in range(len(found))]
    assert len(set(draws)) > 3


def test_the_log_shows_how_loops_fail(runs: Path) -> None:
    last = steps(runs, "parts")[-1]
    assert -1 <= last["loop/token_correlation"] <= 1
    assert {"loop/grad_norm/1", "loop/grad_norm/2", "loop/residual", "loop/state_norm"} <= set(last)
    records = read_metrics(runs / "parts/metrics.jsonl")
    held_out = [r for r in records if "valid/hmm/loss" in r]
    assert all({f"valid/hmm/loss_r{r}" for r in DEPTHS} <= set(record) for record in held_out)
    first = held_out[0]
    assert len({first[f"valid/hmm/loss_r{r}"] for r in DEPTHS}) == len(DEPTHS)


def test_accuracy_by_depth_is_a_table_and_a_plot(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = [f"two={runs / 'whole'}", f"two={runs / 'parts'}", f"one={runs / 'whole'}"]
    plot = tmp_path / "depth.png"
    words = f"--task khop num_queries=2 --depth-keys min_hops max_hops --depths 1 3 --length 16 \
        --num-recurrences 1 4 --max-samples 4 --device cpu --plot {plot}".split()
    monkeypatch.setattr(sys, "argv", ["depth.py", "--checkpoint", *checkpoints, *words])
    runpy.run_path(str(DEPTH_TOOL), run_name="__main__")
    out = capsys.readouterr().out
    assert "two, 2 runs: mean accuracy" in out and "one, 1 runs: mean accuracy" in out
    rows = [line for line in out.splitlines() if line.startswith(("| 1 |", "| 3 |"))]
    # Both runs are one: what is averaged does not spread.
    assert len(rows) == 4 and rows[:2] == rows[2:] and all(row.count("|") == 4 for row in rows)
    accuracies = [float(cell) for row in rows for cell in row.strip("| ").split("|")[1:]]
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    assert plot.read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(sys, "argv", ["depth.py", "--checkpoint", "runs/whole", *words])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(DEPTH_TOOL), run_name="__main__")
    assert capsys.readouterr().err == "error: --checkpoint runs/whole: expected LABEL=PATH\n"


def monitored(step: int, **record: float) -> tuple[LoopMonitor, Any, dict[str, float]]:
    config = run_config(**SECTIONS)
    trainer = SimpleNamespace(config=config, state=SimpleNamespace(step=step))
    return LoopMonitor(), trainer, record


@pytest.mark.parametrize("step", [1, 5])
def test_a_collapse_is_warned_of_once(step: int, caplog: pytest.LogCaptureFixture) -> None:
    monitor, trainer, record = monitored(step, **{"loop/token_correlation": 0.97})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            monitor.on_step(trainer, record)
    # The warm-up of two steps says nothing.
    assert len(caplog.messages) == (step == 5)
    if step == 5:
        assert "step 5: loop/token_correlation=0.970" in caplog.messages[0]
        for correlation, expected in ((0.9, 1), (0.96, 1), (0.5, 1), (0.96, 2)):
            monitor.on_step(trainer, {"loop/token_correlation": correlation})
            assert len(caplog.messages) == expected


@pytest.mark.parametrize("deep", [2.0, 1.9])
def test_recurrences_that_do_not_help_are_warned_of(
    deep: float, caplog: pytest.LogCaptureFixture
) -> None:
    losses = {f"valid/hmm/loss_r{r}": 2.0 for r in DEPTHS} | {"valid/hmm/loss_r8": deep}
    monitor, trainer, record = monitored(5, **losses)
    with caplog.at_level(logging.WARNING):
        monitor.on_evaluation(trainer, record)
    assert len(caplog.messages) == (deep == 2.0)
    if caplog.messages:
        assert "valid/hmm: the loss at 8 recurrences, 2.0000, is not below" in caplog.messages[0]


def test_keys_of_loops_need_a_loop() -> None:
    for section, key in (
        ({"parallel": {"activation_checkpointing": "recurrence"}}, "parallel.activation_check"),
        ({"evaluation": {"num_recurrences": [2]}}, "evaluation.num_recurrences"),
    ):
        with pytest.raises(ValueError, match=f"{key}.*model.stack is not looped; leave it out"):
            run_config(**section)
