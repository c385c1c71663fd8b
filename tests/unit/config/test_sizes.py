"""Sizes of the published xLSTM 7B; that those of any model are right is in tests/contract."""

import pytest
import torch

from megarec.config.loader import load_config
from megarec.models import Backbone
from megarec.optim.build import is_decayed
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
