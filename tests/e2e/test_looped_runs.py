"""Training runs of looped stacks: depth in the log, the same after a resume, and warnings."""

import logging
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

DEPTHS = (1, 2, 8)
SECTIONS: dict[str, Any] = {
    "model": looped_tree(depth=POISSON | {"per": "micro_batch"}, backprop=2),
    "parallel": {"activation_checkpointing": "recurrence"},
    "evaluation": {"max_samples": 8, "num_recurrences": DEPTHS},
}


def steps(runs: Path, name: str) -> list[dict[str, Any]]:
    return [r for r in read_metrics(runs / name / "metrics.jsonl") if "loss" in r]


def test_a_resumed_run_draws_the_same_depths(tmp_path: Path) -> None:
    assert session(tmp_path, "whole", **SECTIONS) == 0
    assert session(tmp_path, "parts", **SECTIONS, hooks=["e2e_runs:StopOneRank"]) == 75
    assert session(tmp_path, "parts", **SECTIONS, force=True) == 0
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")
    found = [r["loop/recurrences"] for r in steps(tmp_path, "parts")]
    # Micro-batches of 2 make a step of 8 samples: each has drawn its own.
    depth, seed = LognormalPoissonDepth(mean=3), run_config().seed
    draws = [depth.draw(seed, i, 2) for i in range(4 * len(found))]
    assert found == [sum(draws[4 * i : 4 * i + 4]) / 4 for i in range(len(found))]
    assert len(set(draws)) > 3

    last = steps(tmp_path, "parts")[-1]
    assert -1 <= last["loop/token_correlation"] <= 1
    assert {"loop/grad_norm/1", "loop/grad_norm/2", "loop/residual", "loop/state_norm"} <= set(last)
    records = read_metrics(tmp_path / "parts/metrics.jsonl")
    held_out = [r for r in records if "valid/hmm/loss" in r]
    assert all({f"valid/hmm/loss_r{r}" for r in DEPTHS} <= set(record) for record in held_out)
    first = held_out[0]
    assert len({first[f"valid/hmm/loss_r{r}"] for r in DEPTHS}) == len(DEPTHS)


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
