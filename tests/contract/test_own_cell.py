"""A cell of one's own, without a Jacobian, trains and decodes like those that ship."""

from pathlib import Path

import pytest
import torch
from e2e_runs import held_out, losses, session

from megarec.conversion.load import load_model
from megarec.generation import generate
from megarec.models.mixers import para_rnn
from megarec.train.hooks.jsonl import read_metrics

MODEL = {
    "blocks": {"mgu": {"mixer": {"type": "mgu", "num_heads": 4}, "ffn": {"d_ff": 48}}},
    "pattern": ["mgu"],
}


def test_it_trains_and_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session(tmp_path, "mgu", model=MODEL) == 0
    assert losses(tmp_path, "mgu")[-1] < losses(tmp_path, "mgu")[0] - 0.3
    before, after = held_out(tmp_path, "mgu")
    assert after < before - 0.5
    steps = [r for r in read_metrics(tmp_path / "mgu/metrics.jsonl") if "newton/residual" in r]
    assert len(steps) == 12
    assert all(step["newton/residual"] < 1e-3 and step["newton/fallbacks"] == 0 for step in steps)

    # Greedy decoding picks what the whole sequence makes most likely, with a step a token.
    model = load_model(tmp_path / "mgu")[0].eval()
    (text,) = generate(model, [[3, 1, 4]], max_new_tokens=8)
    ids = torch.tensor([[3, 1, 4, *text]])
    with torch.no_grad():
        assert model(ids)[0, 2:-1].argmax(-1).tolist() == list(text)
    lengths: list[int] = []
    solve = para_rnn.newton_rnn

    def counted(cell, u, params, **options):
        lengths.append(u.shape[1])
        return solve(cell, u, params, **options)

    monkeypatch.setattr(para_rnn, "newton_rnn", counted)
    generate(model, [[3, 1, 4]], max_new_tokens=8)
    assert lengths[:2] == [3, 3] and set(lengths[2:]) == {1}


def test_contributing_shows_the_file() -> None:
    root = Path(__file__).parents[2]
    section = (root / "CONTRIBUTING.md").read_text().split("## A cell of your own")[1]
    shown = section.split("```python")[1].split("```")[0]
    source = (Path(__file__).parent / "minimal_gated_unit.py").read_text()
    lines = [line.partition("  # ")[0] for line in shown.splitlines()]
    assert len(lines) > 15 and not [line for line in lines if line not in source.splitlines()]
