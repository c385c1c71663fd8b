"""A tiny looped model that tests of several kinds share."""

from typing import Any

from small import model_config, model_tree

from megarec.config.model import ModelConfig

ATTENTION = {"type": "attention", "num_heads": 2}
STACK = {"type": "looped", "prelude": 1, "core": 2, "coda": 1, "num_recurrences": 4}
POISSON = {"type": "lognormal_poisson", "mean": 3}


def looped_tree(**stack: Any) -> dict[str, Any]:
    """Return the model section of a 1-2-1 looped transformer, some keys of its stack changed."""
    blocks = {"b": {"mixer": ATTENTION, "ffn": {"d_ff": 24}, "norm_placement": "sandwich"}}
    return model_tree(
        d_model=16, num_layers=4, blocks=blocks, pattern=["b"], head={}, stack=STACK | stack
    )


def looped_config(**stack: Any) -> ModelConfig:
    """Return its config."""
    return model_config(**looped_tree(**stack))
