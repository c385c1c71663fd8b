"""Models that are fast to convert and hide nothing."""

from pathlib import Path
from typing import Any

import torch
import yaml

from megarec.checkpoint.dcp import model_tensors
from megarec.checkpoint.manager import CheckpointManager
from megarec.config.model import ModelConfig
from megarec.config.schema import CheckpointConfig, Config
from megarec.conversion.hf import check_tensors
from megarec.models import Backbone, build_model
from megarec.train.state import TrainState


def tiny_config(**changes: Any) -> ModelConfig:
    """A model section; keys of `changes` replace those of the top level, mixer_* of the mixer."""
    mixer = {"type": "mlstm", "num_heads": 2, "chunk_size": 8}
    mixer |= {k.removeprefix("mixer_"): v for k, v in changes.items() if k.startswith("mixer_")}
    tree = {
        "vocab_size": 320,
        "d_model": 128,
        "num_layers": 2,
        "blocks": {"mlstm": {"mixer": mixer, "ffn": {"d_ff": 192}}},
        "pattern": ["mlstm"],
        "head": {"soft_cap": 30.0},
    }
    tree |= {k: v for k, v in changes.items() if not k.startswith("mixer_")}
    return ModelConfig.model_validate(tree)


# Large, so that a wrong one shows.
EPS = 0.01
MAMBA2 = {
    "type": "mamba2",
    "norm_eps": EPS,
    "num_heads": 8,
    "head_dim": 8,
    "state_dim": 16,
    "num_groups": 2,
    "chunk_size": 8,
}
ATTENTION = {"type": "attention", "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 64}
NOPE = ATTENTION | {"rope": None, "head_dim": 12}
SWIGLU = {"d_ff": 48}

LAYERED: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        "blocks": {
            "m": {"mixer": MAMBA2 | {"num_heads": 6}},
            "a": {"mixer": NOPE},
            "f": {"ffn": {"type": "squared_relu", "d_ff": 40}},
        },
        "pattern": "mfmamf",
    },
    "granitemoehybrid": {
        "blocks": {
            "m": {"mixer": MAMBA2, "ffn": SWIGLU, "residual_scale": 0.5},
            "a": {"mixer": NOPE | {"scale": 0.4}, "ffn": SWIGLU, "residual_scale": 0.5},
        },
        "pattern": "mmam",
        "embedding_scale": 3.0,
        "head": {"logit_scale": 0.25},
    },
    "mamba2": {"blocks": {"m": {"mixer": MAMBA2 | {"conv_bias": False}}}, "pattern": "mmm"},
    "llama": {"blocks": {"a": {"mixer": ATTENTION, "ffn": SWIGLU}}, "pattern": "aa"},
    "mistral": {
        "blocks": {"a": {"mixer": ATTENTION | {"window": 5, "head_dim": 12}, "ffn": SWIGLU}},
        "pattern": "aa",
    },
}
"""Model sections of 64 channels that have a class of transformers of their own."""


def layered_config(model_type: str, **changes: Any) -> ModelConfig:
    """A model section of LAYERED; keys of `changes` replace those of the top level."""
    tree = {"vocab_size": 257, "d_model": 64, "norm": {"eps": EPS}} | LAYERED[model_type] | changes
    return ModelConfig.model_validate({"num_layers": len(tree["pattern"])} | tree)


def change_mixers(model_type: str, **changes: Any) -> ModelConfig:
    """A model section of LAYERED with some keys of every mixer changed."""
    blocks = {
        name: block | {"mixer": block["mixer"] | changes} if "mixer" in block else block
        for name, block in LAYERED[model_type]["blocks"].items()
    }
    return layered_config(model_type, blocks=blocks)


def random_model(config: ModelConfig) -> Backbone:
    """A model whose every parameter is random: its initial gates would hide what they do."""
    return randomize(build_model(config))


@torch.no_grad()
def randomize(model: Any) -> Any:
    """Add noise to every parameter, of our models and those of transformers alike.

    Step sizes of Mamba-2 lie between 1e-4 and 1.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            parameter.copy_(torch.linspace(-8.0, 0.0, len(parameter)))
        if name.endswith("igate.bias"):
            parameter.fill_(-1.0)
        noise = torch.empty(parameter.shape).normal_(0, 0.1, generator=generator)
        parameter.add_(noise.to(parameter.dtype))
    return model.eval()


def run_config(model: ModelConfig) -> Config:
    return Config.model_validate(
        {
            "name": "tiny",
            "model": model,
            "data": {"train": {"text": {"path": "data/text"}}, "bos": "eod"},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 10, "seq_len": 16, "global_batch_size": 2, "micro_batch_size": 2},
        }
    )


def write_run(run: Path, model: Backbone, step: int = 10) -> Path:
    """Write what a run of `model` leaves behind."""
    run.mkdir(exist_ok=True)
    plain = run_config(model.config).model_dump(mode="json")
    (run / "config.yaml").write_text(yaml.safe_dump(plain))
    tensors = model_tensors(model)
    tensors["optimizer.norm.weight.exp_avg"] = torch.ones(model.config.d_model)
    state = TrainState(step=step, samples=2 * step, tokens=32 * step).to_json()
    CheckpointManager(run / "checkpoints", CheckpointConfig()).save(step, tensors, {"train": state})
    return run


def assert_same_weights(model: Backbone, expected: Backbone) -> None:
    check_tensors("", model.state_dict(), expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
