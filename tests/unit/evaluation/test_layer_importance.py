"""Layer importance: the loss without a mixer is the loss of a model whose mixer adds nothing."""

from pathlib import Path

import pytest
import torch
from small import model_config, random_model

from megarec.data.loader import EvalLoader
from megarec.data.synthetic import make_task
from megarec.data.synthetic.source import SyntheticEvalSource
from megarec.evaluation.layer_importance import leave_one_out, plot_importance
from megarec.evaluation.loss import evaluate_loss

CPU = torch.device("cpu")
BLOCKS = {
    "M": {"mixer": {"type": "mamba2", "num_heads": 4, "head_dim": 8, "state_dim": 4}},
    "*": {"mixer": {"type": "attention", "num_heads": 4}},
    "-": {"ffn": {"d_ff": 20}},
}


def test_leave_one_out(tmp_path: Path) -> None:
    model = random_model(model_config(blocks=BLOCKS, pattern="M-*-M", num_layers=5))
    loader = EvalLoader(
        [SyntheticEvalSource(make_task("hmm"), "hmm", seq_len=16)],
        micro_batch_size=4,
        data_rank=0,
        data_ranks=1,
        max_samples=8,
    )
    whole, importance = leave_one_out(model, loader, CPU)
    assert whole == evaluate_loss(model, loader, CPU)["hmm"].loss
    assert {layer.layer: layer.mixer for layer in importance} == {
        0: "mamba2",
        2: "attention",
        4: "mamba2",
    }
    assert [x.increase for x in importance] == sorted(x.increase for x in importance)
    for layer in importance:
        weight = model.blocks[str(layer.layer)].mixer.out_proj.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
        assert layer.loss == pytest.approx(evaluate_loss(model, loader, CPU)["hmm"].loss, rel=1e-6)
        assert layer.increase == layer.loss - whole != 0
        with torch.no_grad():
            weight.copy_(kept)
    # Nothing of it stays behind.
    assert evaluate_loss(model, loader, CPU)["hmm"].loss == whole
    plot_importance(importance, tmp_path / "importance.png")
    assert (tmp_path / "importance.png").stat().st_size > 5_000
