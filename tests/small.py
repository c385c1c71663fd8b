"""Small models and recipes that many tests share."""

from typing import Any

from megarec.config.model import ModelConfig
from megarec.config.schema import Config
from megarec.models import Backbone
from megarec.testing import case


def model_tree(**changes: Any) -> dict[str, Any]:
    """Return the model section of a tiny xLSTM, with some of its keys changed."""
    mixer = {"type": "mlstm", "num_heads": 2, "igate_bias_init": -1.0, "chunk_size": 8}
    return {
        "vocab_size": 61,
        "d_model": 32,
        "num_layers": 2,
        "blocks": {"mlstm": {"mixer": mixer, "ffn": {"d_ff": 48}}},
        "pattern": ["mlstm"],
        "head": {"soft_cap": 30.0, "chunk_size": 16},
    } | changes


def layers_tree(*mixers: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the model section of the same model with these mixers, a layer each, and no FFNs."""
    blocks = {f"b{i}": {"mixer": mixer} for i, mixer in enumerate(mixers)}
    return model_tree(num_layers=len(mixers), blocks=blocks, pattern=list(blocks), **changes)


def model_config(**changes: Any) -> ModelConfig:
    """Return the config of a tiny xLSTM."""
    return ModelConfig.model_validate(model_tree(**changes))


def random_model(config: ModelConfig | None = None, seed: int = 0) -> Backbone:
    """Build a model, by default the tiny xLSTM, whose every parameter is random."""
    return case.random_model(config or model_config(), seed)


def run_config(name: str = "tiny", **sections: dict[str, Any]) -> Config:
    """Return a recipe of a few seconds on synthetic data; sections override single keys."""
    tree: dict[str, Any] = {
        "name": name,
        "model": model_tree(),
        "data": {
            "train": {"hmm": {"synthetic": "hmm"}},
            "valid": {"hmm": {"synthetic": "hmm"}},
        },
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 2},
        "train": {"steps": 12, "seq_len": 32, "global_batch_size": 8, "micro_batch_size": 2},
        "checkpoint": {"every": 4},
        "evaluation": {"max_samples": 8},
        "hooks": [],
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
    return Config.model_validate(tree)
