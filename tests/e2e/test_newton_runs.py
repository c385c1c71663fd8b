"""Training runs of ParaRNN: weights within their bound, Newton in the log, failures in a line."""

import importlib.util
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from e2e_runs import losses, session
from small import layers_tree, run_config

from megarec.models.mixers import para_rnn
from megarec.parallel.apply import build_sharded_model
from megarec.parallel.mesh import build_mesh
from megarec.testing.distributed import run_ranks
from megarec.train.hooks.jsonl import read_metrics
from megarec.train.trainer import Trainer

TRAIN_SCRIPT = Path(__file__).parents[2] / "pretrain/train.py"
GRU, LSTM = {"type": "para_gru"}, {"type": "para_lstm"}
NEVER = {"iterations": 1, "tolerance": 1e-15}
"""What no solution meets."""


def logged_steps(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


def constrained_shards(world_size: int) -> dict[str, str]:
    """Project sharded weights that are far too large; say of each parameter what became of it."""
    recipe = run_config(model=layers_tree(GRU | {"clip": 0.25}, LSTM | {"clip": 0.125}))
    mesh = build_mesh(recipe.parallel, world_size, "cpu")
    model = build_sharded_model(recipe, mesh, torch.device("cpu")).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    model.constrain_()
    outcome = {}
    for name, parameter in model.named_parameters():
        after = parameter.full_tensor()
        changed = not torch.equal(after, before[name])
        bound = after.abs().max().item()
        right = torch.equal(after, before[name].clamp(-bound, bound))
        outcome[name] = f"clipped to {bound}" if changed and right else f"changed: {changed}"
    return outcome


def one_rank(rank: int, world_size: int, runs: str) -> dict[str, str]:
    outcome = constrained_shards(world_size)
    solve, reports = para_rnn.newton_rnn, []

    def another(*args: Any, **options: Any) -> Any:
        """Let the second layer of the second rank fall back, in one micro-batch of two."""
        h, last, report = solve(*args, **options)
        reports.append(report)
        if rank == 1 and len(reports) == 4:
            report.residuals, report.fell_back = [1.0, 0.5, 0.4, 0.3, 7.0], True
        return h, last, report

    model, train = layers_tree(GRU, LSTM), {"steps": 1, "micro_batch_size": 2}
    with patch.object(para_rnn, "newton_rnn", another):
        session(Path(runs), "run", model=model, train=train, data={"valid": {}})
    return outcome


def test_two_ranks(tmp_path: Path) -> None:
    """Shards are projected; what is logged is the largest of layers and ranks."""
    for outcome in run_ranks(one_rank, 2, str(tmp_path)):
        recurrent = {
            "blocks.0.mixer.recurrence.weights.A": "clipped to 0.25",
            "blocks.1.mixer.recurrence.weights.A": "clipped to 0.125",
            "blocks.1.mixer.recurrence.weights.C": "clipped to 0.125",
        }
        assert outcome == dict.fromkeys(outcome, "changed: False") | recurrent
    (record,) = logged_steps(tmp_path / "run")
    assert record["newton/residual"] == 7 and record["newton/iterations"] == 4
    assert record["newton/fallbacks"] == 0.5


@pytest.mark.parametrize("mixer", [GRU, LSTM], ids=lambda mixer: mixer["type"])
def test_weights_are_projected_after_each_step(mixer: dict[str, Any], tmp_path: Path) -> None:
    """With a learning rate that would carry each of them over the bound at once."""
    fast = {"optimizer": {"lr": 1.0, "weight_decay": 0.0}, "schedule": {"warmup_steps": 0}}
    step, largest = Trainer.train_step, []

    def watched(self: Trainer, *args: Any) -> Any:
        result = step(self, *args)
        weights = self.model.blocks["0"].mixer.recurrence.weights
        largest.append([weight.abs().max().item() for weight in weights.values()])
        return result

    for clip in (0.3, None):
        model = layers_tree(mixer | {"clip": clip})
        with patch.object(Trainer, "train_step", watched):
            session(tmp_path, str(clip), model=model, train={"steps": 2}, **fast)
    clipped, free = largest[:2], largest[2:]
    assert all(value == pytest.approx(0.3) for step in clipped for value in step)
    assert all(value > 0.6 for step in free for value in step)


def test_the_log_says_what_newton_did(tmp_path: Path) -> None:
    """The largest of the layers; recomputed activations and held-out data change nothing."""
    layers = layers_tree(LSTM | NEVER, GRU | {"early_stop": True, "tolerance": 0.1})
    once = {"activation_checkpointing": "none"}
    twice = {"activation_checkpointing": "full"}
    for name, parallel in (("once", once), ("twice", twice)):
        session(tmp_path, name, model=layers, train={"steps": 2}, parallel=parallel)
    newton = [
        [{key: value for key, value in step.items() if "newton" in key} for step in steps]
        for steps in map(logged_steps, (tmp_path / "once", tmp_path / "twice"))
    ]
    assert newton[0] == newton[1] and len(newton[0]) == 2
    for step in newton[0]:
        assert step.keys() == {"newton/residual", "newton/iterations", "newton/fallbacks"}
        assert step["newton/iterations"] == step["newton/fallbacks"] == 1
        assert 1e-6 < step["newton/residual"] < 1
    session(tmp_path, "easy", model=layers_tree(GRU, LSTM), train={"steps": 2})
    for step in logged_steps(tmp_path / "easy"):
        assert step["newton/iterations"] == 3 and step["newton/fallbacks"] == 0
        assert step["newton/residual"] < 1e-3
    session(tmp_path, "other", train={"steps": 1})
    assert not any("newton" in key for key in logged_steps(tmp_path / "other")[0])


def train_script() -> Any:
    spec = importlib.util.spec_from_file_location("train_script", TRAIN_SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_a_layer_that_fails_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = layers_tree(LSTM, LSTM, LSTM, GRU | NEVER | {"on_failure": "raise"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(run_config(model=model).model_dump(mode="json")))
    script = train_script()
    words = ["train.py", "--config", str(recipe), "--runs", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    assert script.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: layer 3: newton_rnn: ParaGRUCell: residual ")
    assert json.loads((tmp_path / "tiny/status.json").read_text())["state"] == "failed"

    # It may happen on one rank alone, and then the others have nothing to say.
    def fails(*_: Any) -> int:
        raise FloatingPointError("layer 3: newton_rnn: ...")

    monkeypatch.setattr(script, "run", fails)
    monkeypatch.setenv("RANK", "1")
    assert script.main() == 1
    assert capsys.readouterr().err == "error: layer 3: newton_rnn: ...\n"


def test_a_nan_reaches_the_policy_for_steps_that_are_not_finite(tmp_path: Path) -> None:
    """It is no error of the solver's, even of one that raises: the trainer skips the step."""
    solve, solved = para_rnn.newton_rnn, []

    def poisoned(cell: Any, u: Any, params: Any, **options: Any) -> Any:
        """Put a NaN into the second of three steps, each of four micro-batches."""
        solved.append(u.shape)
        return solve(cell, u * torch.nan if len(solved) == 6 else u, params, **options)

    model = layers_tree(GRU | {"on_failure": "raise"})
    policy = {"nonfinite": {"policy": "skip", "max_consecutive": 1}}
    with patch.object(para_rnn, "newton_rnn", poisoned):
        session(tmp_path, "run", model=model, data={"valid": {}}, train={"steps": 3} | policy)
    steps = logged_steps(tmp_path / "run")
    assert [step["skipped"] for step in steps] == [0, 1, 1]
    assert [loss == loss for loss in losses(tmp_path, "run")] == [True, False, True]
    assert steps[1]["newton/residual"] == torch.inf and steps[2]["newton/residual"] < 1e-3
