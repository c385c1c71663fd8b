"""What tensor parallelism divides, and what it refuses before anything is built."""

from typing import Any

import pytest
from looped_models import looped_tree
from small import layers_tree, model_tree, run_config

from megarec.config.mixer import MixerConfig
from megarec.models.mixers.attention import AttentionConfig
from megarec.parallel.mesh import place

EVEN = {"vocab_size": 64}
ATTENTION = {"type": "attention", "num_heads": 4, "num_kv_heads": 2}
MAMBA = {"type": "mamba2", "num_heads": 4, "head_dim": 16, "state_dim": 8}
HALT = {"halt": {"type": "exit_gate"}}
DISTILL = {"teacher": "runs/teacher"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": (
        {"model": model_tree()},
        r"model.vocab_size=61: parallel.tp=2 does not divide it; 62 does",
    ),
    "heads": (
        {"model": model_tree(**EVEN), "parallel": {"tp": 4}},
        r"model.blocks.mlstm.mixer.num_heads=2: parallel.tp=4 does not divide it",
    ),
    "heads of keys": (
        {"model": layers_tree(ATTENTION, **EVEN), "parallel": {"tp": 4}},
        r"model.blocks.b0.mixer.num_kv_heads=2: parallel.tp=4",
    ),
    "groups": ({"model": layers_tree(MAMBA, **EVEN)}, r"mixer.num_groups=1: parallel.tp=2"),
    "FFN": (
        {"model": model_tree(blocks={"b": {"ffn": {"d_ff": 47}}}, pattern=["b"], **EVEN)},
        r"model.blocks.b.ffn.d_ff=47: parallel.tp=2",
    ),
    "tokens": (
        {"model": model_tree(**EVEN), "train": {"seq_len": 33}},
        r"train.seq_len=33: parallel.tp=2 does not divide it; tokens between mixers",
    ),
    "halting": ({"model": looped_tree(**HALT) | EVEN}, r"model.stack.halt=exit_gate: its losses"),
    "distillation": ({"model": model_tree(**EVEN), "distill": DISTILL}, r"distill: student and"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_divide_is_refused(name: str) -> None:
    sections, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        run_config(**{"parallel": {"tp": 2}} | sections)


def test_all_that_does_not_divide_is_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"num_heads=2(.|\n)*vocab_size=61(.|\n)*seq_len=33"):
        run_config(parallel={"tp": 4}, train={"seq_len": 33})


def test_a_mixer_that_does_not_say_what_divides_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(AttentionConfig, "tp_sizes", MixerConfig.tp_sizes)
    with pytest.raises(ValueError, match=r"blocks.b0.mixer: attention does not say what tensor"):
        run_config(model=layers_tree(ATTENTION, **EVEN), parallel={"tp": 2})


def test_ranks_that_divide_tensors_read_the_same_rows_and_one_counts_them() -> None:
    parallel = run_config(model=model_tree(**EVEN), parallel={"pp": 2, "tp": 2}).parallel
    places = [place(parallel, rank, 8) for rank in range(8)]
    assert [at.data_rank for at in places] == [0, 0, 1, 1] * 2
    assert [at.tp_rank for at in places] == [0, 1] * 4
    assert [rank for rank, at in enumerate(places) if at.counts_data] == [0, 2]
    assert [rank for rank, at in enumerate(places) if at.counts_loss] == [0, 2, 4, 6]
