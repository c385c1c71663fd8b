"""RoPE of every kind, as transformers computes it, and in both spellings of config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion.tiny_models import change_mixers, random_model
from conversion.with_transformers import assert_same_as_transformers, some_ids
from megarec_kernels.rotary import rotary

from megarec.conversion import export_hf, import_hf, load_model
from megarec.models.rotary import RotaryConfig, rotation

# Lengths of 21 tokens lie beyond the original length, so that every branch is met.
LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {"type": "llama3", "factor": 8.0, "original_max_seq_len": 16, "low_freq_factor": 0.5}
YARN = {"type": "yarn", "factor": 4.0, "original_max_seq_len": 16}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"base": 500.0},
    "linear": {"base": 500.0, "scaling": LINEAR},
    "llama3": {"base": 500.0, "scaling": LLAMA3},
    "llama3, wide": {"scaling": LLAMA3 | {"high_freq_factor": 32.0}},
    "yarn": {"base": 500.0, "scaling": YARN},
    "yarn, narrow": {"scaling": YARN | {"beta_fast": 4.0, "beta_slow": 0.5}},
    "yarn, factor": {"scaling": YARN | {"attention_factor": 1.5}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers(tmp_path: Path, kind: str) -> None:
    model = random_model(change_mixers("llama", rope=KINDS[kind]))
    export_hf(model, tmp_path / "out")
    assert_same_as_transformers(model, tmp_path / "out", "LlamaForCausalLM")
    config, _ = import_hf(tmp_path / "out")
    assert config.layers[0].mixer.rope == model.config.layers[0].mixer.rope
    if kind != "plain":
        plain = random_model(change_mixers("llama", rope=KINDS["plain"]))
        assert (plain(some_ids()) - model(some_ids())).abs().max() > 0.01


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_partial_rotation(fraction: float) -> None:
    from transformers import BambaConfig
    from transformers.models.bamba import modeling_bamba

    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": fraction}
    config = BambaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    generator = torch.Generator().manual_seed(0)
    q_BTHK, k_BTHK = (torch.randn(2, 21, 4, 16, generator=generator) for _ in range(2))
    position_BT = torch.arange(21).expand(2, 21)
    angles = modeling_bamba.BambaRotaryEmbedding(config)(q_BTHK, position_BT)
    theirs = modeling_bamba.apply_rotary_pos_emb(q_BTHK, k_BTHK, *angles, unsqueeze_dim=2)
    ours = rotation(
        RotaryConfig(base=500.0, fraction=fraction), 16, position_BT, dtype=torch.float32
    )
    for x_BTHK, expected in zip((q_BTHK, k_BTHK), theirs, strict=True):
        torch.testing.assert_close(rotary(x_BTHK, ours), expected, rtol=0, atol=1e-5)


OLD = [
    ({"rope_theta": 500.0}, {"base": 500.0}),
    ({"rope_theta": 500.0, "rope_scaling": None}, {"base": 500.0}),
    (
        {"rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 2}},
        {"base": 500.0, "scaling": {"type": "linear", "factor": 2.0}},
    ),
    (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        {"scaling": {"type": "llama3", "factor": 8.0, "original_max_seq_len": 16}},
    ),
    # Without it, the original length is max_position_embeddings.
    (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"scaling": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 64}},
    ),
]


@pytest.mark.parametrize(("keys", "rope"), OLD)
@torch.no_grad()
def test_old_spelling(tmp_path: Path, keys: dict[str, Any], rope: dict[str, Any]) -> None:
    model = random_model(change_mixers("llama", rope=rope))
    export_hf(model, tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        del hf[key]
    (tmp_path / "config.json").write_text(json.dumps(hf | keys))
    loaded, _ = load_model(tmp_path)
    assert loaded.config.layers[0].mixer.rope == RotaryConfig.model_validate(rope)
    assert_same_as_transformers(loaded, tmp_path, "LlamaForCausalLM")
