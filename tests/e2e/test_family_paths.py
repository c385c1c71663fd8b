"""The main path of every other family with real commands: killed, resumed, released, loaded."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import Commands

CLASSES = {
    "hybrid": "NemotronHForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "para_gru": "ParaRNNForCausalLM",
    "para_lstm": "ParaRNNForCausalLM",
}


@pytest.fixture(scope="module")
def runs(commands: Commands) -> list[Path]:
    """Train each recipe, with a kill -9 between two checkpoints, and release it."""

    def train(recipe: str) -> Path:
        run = commands.folder / f"runs/tiny_{recipe}"
        words = ("pretrain/train.py", "--config", f"tiny/{recipe}.yaml")
        commands.python(*words, code=-9, MEGAREC_FAULT="step_begin:6:0:kill9")
        commands.python(*words)
        commands.python("tools/convert.py", "to-hf", "--checkpoint", run, "--out", run / "export")
        return run

    with ThreadPoolExecutor() as pool:
        return list(pool.map(train, CLASSES))


def test_runs_resume_and_learn(runs: list[Path]) -> None:
    for run in runs:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
        bits = [r["valid/shakespeare/bits_per_byte"] for r in records
                if "valid/shakespeare/loss" in r]  # fmt: skip
        # ParaRNN's recipes have a smaller model and learn less in as many steps.
        assert bits[-1] < bits[0] - (1 if "para" in run.name else 3)
        assert json.loads((run / "status.json").read_text())["state"] == "done"


def test_releases_load_in_plain_transformers(commands: Commands, runs: list[Path]) -> None:
    exports = [run / "export" for run in runs]
    with ThreadPoolExecutor() as pool:
        ours = pool.map(commands.generate, runs)
        released = commands.generate_with_transformers(*exports)
    assert [name for name, _ in released] == list(CLASSES.values())
    assert [texts for _, texts in released] == list(ours)
    for run in runs:
        assert "loss.png" in (run / "export/README.md").read_text()
