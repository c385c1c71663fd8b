"""Sizes computed from a config equal those of the model that it builds."""

import pytest
import torch

from megarec.config.loader import load_config
from megarec.config.model import ModelConfig
from megarec.models import Backbone
from megarec.optim.adamw import is_decayed
from megarec.parallel.describe import describe


def test_xlstm_7b_is_the_published_model() -> None:
    config = load_config("xlstm_7b.yaml")
    assert config.model.num_params() == 6_865_424_896
    assert config.model.flops_per_token(8192) == pytest.approx(40.4e9, rel=2e-3)
    assert config.model.state_bytes(8192) == pytest.approx(128.3 * 2**20, rel=1e-3)
    assert config.train.steps * config.train.global_batch_size * 8192 == pytest.approx(
        2.307e12, rel=1e-3
    )
    with torch.device("meta"):
        parameters = dict(Backbone(config.model).named_parameters())
    assert sum(p.numel() for p in parameters.values()) == 6_865_424_896
    decayed = sum(p.numel() for name, p in parameters.items() if is_decayed(name, p))
    assert decayed == 6_658_981_888


def test_the_dry_run_says_so() -> None:
    lines = describe(load_config("xlstm_7b.yaml"), 1).splitlines()
    assert lines[0] == "parameters: 6,865,424,896"
    assert lines[1].startswith("FLOPs per token: 40.")
    assert "processes: 128 (dp_replicate 16 x dp_shard 8)" in lines


@pytest.mark.parametrize("tied", [False, True])
def test_small_models_too(tied: bool) -> None:
    config = ModelConfig.model_validate(
        {
            "vocab_size": 50,
            "d_model": 24,
            "num_layers": 4,
            "blocks": {
                "a": {"mixer": {"type": "mlstm", "num_heads": 2}, "ffn": {"d_ff": 40}},
                "b": {"mixer": {"type": "mlstm", "num_heads": 3, "v_dim_factor": 2.0}},
            },
            "pattern": ["a", "b"],
            "head": {"tie_embeddings": tied},
        }
    )
    model = Backbone(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_params()
    state = model.init_state(1)
    assert sum(t.numel() * t.element_size() for t in state.values()) == config.state_bytes(1)
