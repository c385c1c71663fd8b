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


def random_model(config: ModelConfig) -> Backbone:
    """A model whose every parameter is random: its initial gates would hide what they do."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty(parameter.shape).normal_(0, 0.1, generator=generator)
            parameter.add_(noise)
        for block in model.blocks.values():
            block.mixer.gates.igate.bias.fill_(-1.0)
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
