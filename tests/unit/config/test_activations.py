"""What blocks keep for the backward pass, with every option beside the mixer."""

from typing import Any

import pytest
from looped_models import ATTENTION
from small import model_config

from megarec.testing.contract import CHECKS, Case

GRU = {"type": "para_gru", "num_heads": 2}
BLOCKS: dict[str, dict[str, Any]] = {
    "post": {"mixer": ATTENTION, "ffn": {"type": "gelu", "d_ff": 48}, "norm_placement": "post"},
    "sandwich": {"mixer": ATTENTION, "ffn": {"d_ff": 48}, "norm_placement": "sandwich"},
    "peri": {
        "mixer": ATTENTION,
        "ffn": {"type": "squared_relu", "d_ff": 48},
        "norm_placement": "peri",
        "layer_scale": 0.1,
    },
    "skip": {"mixer": GRU, "learned_skip": True, "layer_scale": 0.1, "residual_scale": 0.5},
    "ffn": {"ffn": {"type": "gelu", "d_ff": 64}},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_keeps_what_it_says(name: str) -> None:
    CHECKS["activations"](
        Case(model_config(num_layers=1, blocks={"b": BLOCKS[name]}, pattern=["b"]))
    )
