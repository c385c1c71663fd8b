"""The main path of every other family with real commands: killed, resumed, released, loaded."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands
from safetensors.torch import load_file

from megarec.config.loader import load_config
from megarec.train import session

CLASSES = {
    "hybrid": "NemotronHForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "para_gru": "ParaRNNForCausalLM",
    "para_lstm": "ParaRNNForCausalLM",
    "looped": "RavenForCausalLM",
    "looped_mlstm": "LoopedForCausalLM",
}
LOOPED = ("looped", "looped_mlstm")
# The fixture runs some twenty commands: a minute and a half of two idle cores, more of busy ones.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def runs(commands: Commands) -> list[Path]:
    """Train each recipe, with a kill -9 between two checkpoints, and release it.

    Looped ones are trained without it, too, as whole_<recipe>.
    """

    def train(recipe: str) -> Path:
        run = commands.folder / f"runs/tiny_{recipe}"
        words = ("pretrain/train.py", "--config", f"tiny/{recipe}.yaml")
        commands.python(*words, code=-9, MEGAREC_FAULT="step_begin:6:0:kill9")
        commands.python(*words)
        if recipe in LOOPED:
            commands.python(*words, f"name=whole_{recipe}", "hooks=[]", "data.valid={}")
        commands.python("tools/convert.py", "to-hf", "--checkpoint", run, "--out", run / "export")
        return run

    with ThreadPoolExecutor() as pool:
        return list(pool.map(train, CLASSES))


def read_records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_runs_resume_and_learn(runs: list[Path]) -> None:
    for run in runs:
        records = read_records(run)
        assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
        bits = [r["valid/shakespeare/bits_per_byte"] for r in records
                if "valid/shakespeare/loss" in r]  # fmt: skip
        # ParaRNN's and looped recipes have a smaller model and learn less in as many steps.
        slow = "para" in run.name or "looped" in run.name
        assert bits[-1] < bits[0] - (1 if slow else 3)
        assert json.loads((run / "status.json").read_text())["state"] == "done"


def test_depths_go_on_where_they_were(commands: Commands, runs: list[Path]) -> None:
    """A looped run that was killed makes the same draws, and the same bits of it all."""
    for recipe in LOOPED:
        resumed, whole = (commands.folder / f"runs/{name}_{recipe}" for name in ("tiny", "whole"))
        steps = [
            [(r["loss"], r["loop/recurrences"]) for r in records if "loss" in r]
            for records in map(read_records, (resumed, whole))
        ]
        assert steps[0] == steps[1]
        assert len({depth for _, depth in steps[0]}) > 3
        (one,), (other,) = (
            run.glob("checkpoints/step_00000012/*.safetensors") for run in (resumed, whole)
        )
        tensors, expected = load_file(one), load_file(other)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("recipe", ["looped_mamba2", "universal", "score", "gated", "looplm"])
def test_other_looped_recipes_learn(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.chdir(commands.folder)
    short = ("name=short", "train.steps=6", "hooks=[]", "data.valid={}")
    config = load_config(f"tiny/{recipe}.yaml", short)
    assert session.run(config, session.Options(Path(f"runs/{recipe}"))) == 0
    losses = [record["loss"] for record in read_records(Path(f"runs/{recipe}/short"))]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3


def test_releases_load_in_plain_transformers(commands: Commands, runs: list[Path]) -> None:
    exports = [run / "export" for run in runs]
    with ThreadPoolExecutor() as pool:
        ours = pool.map(commands.generate, runs)
        released = commands.generate_with_transformers(*exports)
    assert [name for name, _ in released] == list(CLASSES.values())
    assert [texts for _, texts in released] == list(ours)
    for run in runs:
        assert "loss.png" in (run / "export/README.md").read_text()
