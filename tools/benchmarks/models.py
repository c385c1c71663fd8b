"""Whole training steps against transformers' torch path: the same weights, batch and optimizer."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor

from benchmarks.protocol import Clock, compare
from benchmarks.report import Row
from megarec.config.loader import load_config
from megarec.config.model import ModelConfig
from megarec.conversion import export_hf
from megarec.models import Backbone, build_model

PART = "training step"
GATE = 1e-4
"""Largest difference of logits (float32) at which two models count as the same."""

# Recipes whose layers a class of transformers has -> the smallest ratio aimed at.
RECIPES = {
    "quickstart_mamba2.yaml": 1.5,
    "quickstart_hybrid.yaml": 1.5,
    "quickstart.yaml": None,
}
SMOKE_RECIPES = {"tiny/mamba2.yaml": None}

# Bamba's layers: a mixer and a SwiGLU each.
BAMBA = {
    "vocab_size": 2048,
    "d_model": 128,
    "num_layers": 4,
    "blocks": {
        "m": {
            "mixer": {"type": "mamba2", "num_heads": 4, "head_dim": 64, "state_dim": 32},
            "ffn": {"d_ff": 256},
        },
        "a": {
            "mixer": {"type": "attention", "num_heads": 4, "num_kv_heads": 2},
            "ffn": {"d_ff": 256},
        },
    },
    "pattern": "mmam",
    "norm": {"eps": 1e-5},
}
# Our names -> Bamba's, where they are not those of the layout that we export.
BAMBA_NAMES = {
    "post_attention_layernorm": "pre_ff_layernorm",
    "model.norm": "model.final_layernorm",
}


def training_steps(clock: Clock, rounds: int, *, small: bool) -> Iterator[Row]:
    """Yield a row a model: forward, backward and AdamW on one micro-batch."""
    for recipe, target in (SMOKE_RECIPES if small else RECIPES).items():
        config = load_config(recipe)
        shape = (config.train.micro_batch_size, config.train.seq_len + 1)
        yield _measure(recipe, config.model, _exported, shape, target, clock, rounds)
    shape = (1, 33) if small else (4, 257)
    yield _measure(
        "layers of Bamba",
        ModelConfig.model_validate(BAMBA),
        _bamba,
        shape,
        None if small else 1.5,
        clock,
        rounds,
    )


def _measure(
    name: str,
    config: ModelConfig,
    counterpart: Callable[[Backbone, Path], Any],
    shape: tuple[int, int],
    target: float | None,
    clock: Clock,
    rounds: int,
) -> Row:
    model = build_model(config).train()
    with tempfile.TemporaryDirectory() as folder:
        theirs = counterpart(model, Path(folder) / "export").train()
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (model(ids) - theirs(ids).logits).abs().max().item()
    case = f"{name}, {config.num_params():,} parameters, {shape[0]} x {shape[1] - 1} tokens"
    theirs_name = f"transformers {type(theirs).__name__}"
    if not difference <= GATE:
        reason = f"logits are off by {difference:.1e}, more than {GATE:.0e}"
        return Row(PART, case, "megarec", theirs_name, "wrong", reason, our_fault=True)

    def our_loss() -> Tensor:
        loss_sum, num_tokens = model(ids[:, :-1], ids[:, 1:].contiguous())
        return loss_sum / num_tokens

    def their_loss() -> Tensor:
        # The class shifts the labels itself.
        return theirs(ids, labels=ids, use_cache=False).loss

    steps = _trainer(model, our_loss), _trainer(theirs, their_loss)
    found = compare(*steps, clock, rounds)
    return Row(PART, case, "megarec", theirs_name, comparison=found, at_least=target)


def _exported(model: Backbone, folder: Path) -> Any:
    """Return the model in the class of transformers that it is exported to."""
    export_hf(model, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def _bamba(model: Backbone, folder: Path) -> Any:
    """Return Bamba with the model's weights: through the export to Granite's class, its heir."""
    granite = _granite(model, folder)
    ours, attention = model.config.mixers[0], model.config.mixers[2]
    config = transformers.BambaConfig(
        vocab_size=granite.config.vocab_size,
        hidden_size=granite.config.hidden_size,
        intermediate_size=granite.config.shared_intermediate_size,
        num_hidden_layers=granite.config.num_hidden_layers,
        num_attention_heads=granite.config.num_attention_heads,
        num_key_value_heads=granite.config.num_key_value_heads,
        max_position_embeddings=attention.max_seq_len,
        rms_norm_eps=granite.config.rms_norm_eps,
        attn_layer_indices=[
            i for i, kind in enumerate(model.config.mixers) if kind.type == "attention"
        ],
        mamba_n_heads=ours.num_heads,
        mamba_d_head=ours.head_dim,
        mamba_n_groups=ours.num_groups,
        mamba_d_state=ours.state_dim,
        mamba_d_conv=ours.conv_kernel,
        mamba_expand=granite.config.mamba_expand,
        mamba_chunk_size=ours.chunk_size,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    # The constructor makes it a half; the layout that we export turns whole heads.
    config.rope_parameters["partial_rotary_factor"] = 1.0
    theirs = transformers.BambaForCausalLM(config)
    weights = {}
    for name, value in granite.state_dict().items():
        for old, new in BAMBA_NAMES.items():
            name = name.replace(old, new)
        prefix, _, leaf = name.partition(".shared_mlp.")
        if leaf == "input_linear.weight":
            gate, up = value.chunk(2)
            weights |= {f"{prefix}.feed_forward.gate_proj.weight": gate}
            weights |= {f"{prefix}.feed_forward.up_proj.weight": up}
        elif leaf == "output_linear.weight":
            weights[f"{prefix}.feed_forward.down_proj.weight"] = value
        else:
            weights[name] = value
    theirs.load_state_dict(weights)
    return theirs


def _granite(model: Backbone, folder: Path) -> Any:
    export_hf(model, folder, model_type="granitemoehybrid")
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def _trainer(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a function that makes one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
