"""Nemotron-H (arXiv 2504.03624) as transformers' `nemotron_h`: one mixer or FFN a layer."""

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from megarec.config.base import PositiveFloat, PositiveInt
from megarec.config.model import ModelConfig
from megarec.conversion.config_file import NO_LIMIT, ConfigFile, Limit, layer_names
from megarec.conversion.layers import LayeredTarget

MAMBA, ATTENTION, FFN = "M*-"
"""Names of the blocks: the characters of hybrid_override_pattern."""
# Names of layers in config.json, of today and of older files, and in patterns.
LAYERS = {
    "linear_attention": MAMBA,
    "mamba": MAMBA,
    "full_attention": ATTENTION,
    "attention": ATTENTION,
    "mlp": FFN,
} | {name: name for name in (MAMBA, ATTENTION, FFN)}
LISTED = {MAMBA: "linear_attention", ATTENTION: "full_attention", FFN: "mlp"}
Layers = Annotated[tuple[str, ...] | None, layer_names(LAYERS)]

TINY_STEP = 1e-12
"""time_step_min of exports. transformers clamps step sizes to it where it reads whole texts, but
not where it reads single tokens; 0 would fail in its initialisation."""

logger = logging.getLogger(__name__)


class NemotronHFile(ConfigFile):
    """The keys of config.json that shape the model; see ConfigFile."""

    old_keys = {
        "layers_block_type": "layer_types",
        "n_groups": "mamba_n_groups",
        "conv_kernel": "mamba_d_conv",
        "use_conv_bias": "mamba_conv_bias",
        "chunk_size": "mamba_chunk_size",
    }

    vocab_size: PositiveInt = 131072
    hidden_size: PositiveInt = 4096
    layers_block_type: Layers = None
    hybrid_override_pattern: Layers = None
    num_attention_heads: PositiveInt = 32
    num_key_value_heads: PositiveInt | None = 8
    head_dim: PositiveInt = 128
    max_position_embeddings: PositiveInt = 4096
    sliding_window: None = None
    attention_bias: Literal[False] = False
    intermediate_size: PositiveInt = 21504
    mlp_hidden_act: Literal["relu2", "gelu"] = "relu2"
    mlp_bias: Literal[False] = False
    mamba_num_heads: PositiveInt = 128
    mamba_head_dim: PositiveInt = 64
    ssm_state_size: PositiveInt = 128
    n_groups: PositiveInt = 8
    conv_kernel: PositiveInt = 4
    use_conv_bias: bool = True
    chunk_size: PositiveInt = 128
    mamba_hidden_act: Literal["silu"] = "silu"
    mamba_proj_bias: Literal[False] = False
    use_bias: Literal[False] = False
    time_step_limit: Limit = NO_LIMIT
    time_step_min: float = 0.001
    layer_norm_epsilon: PositiveFloat = 1e-5
    num_nextn_predict_layers: Literal[0] = 0

    @field_validator("time_step_limit")
    @classmethod
    def _is_no_limit(cls, limit: tuple[float, float]) -> tuple[float, float]:
        if limit != NO_LIMIT:
            raise ValueError("expected none, [0.0, Infinity]: the class of transformers ignores it")
        return limit

    @model_validator(mode="after")
    def _layers_agree(self) -> "NemotronHFile":
        spellings = {self.layers_block_type, self.hybrid_override_pattern} - {None}
        if len(spellings) != 1:
            problem = "differ; keep one of them" if spellings else "are both missing"
            raise ValueError(f"layers_block_type and hybrid_override_pattern {problem}")
        return self

    def pattern(self) -> tuple[str, ...]:
        """Return the block of each layer."""
        return self.layers_block_type or self.hybrid_override_pattern or ()


class NemotronH(LayeredTarget):
    """Models of layers with one part each: mamba2, attention without positions, un-gated FFN."""

    model_type = "nemotron_h"
    architecture = "NemotronHForCausalLM"
    rank = 1
    can_tie = False
    cache_needs_attention = True
    layouts = (("mixer",), ("ffn",))
    keys = {
        "mamba2": {
            "num_heads": "mamba_num_heads",
            "head_dim": "mamba_head_dim",
            "state_dim": "ssm_state_size",
            "num_groups": "n_groups",
            "conv_kernel": "conv_kernel",
            "conv_bias": "use_conv_bias",
            "norm_eps": "layer_norm_epsilon",
            "chunk_size": "chunk_size",
        },
        "attention": {
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
            "max_seq_len": "max_position_embeddings",
        },
    }
    fixed = {
        "mamba2": {"dt_limit": NO_LIMIT},
        "attention": {
            "rope": None,
            "window": None,
            "qk_bias": False,
            "qk_norm": False,
            "scale": None,
        },
    }
    ffn_acts = {"squared_relu": "relu2", "gelu": "gelu"}
    act_key = "mlp_hidden_act"
    eps_key = "layer_norm_epsilon"
    model_names = {
        "embedding.weight": "backbone.embeddings.weight",
        "norm.weight": "backbone.norm_f.weight",
        "head.weight": "lm_head.weight",
    }
    layer_prefix = "backbone.layers."
    block_names = {
        "mixer_norm.weight": "norm.weight",
        "ffn_norm.weight": "norm.weight",
        "ffn.up.weight": "mixer.up_proj.weight",
        "ffn.down.weight": "mixer.down_proj.weight",
    }
    mixers = {"mamba2": "mixer", "attention": "mixer"}
    old_prefixes = {"model.": "backbone."}

    def export_config(self, config: ModelConfig) -> dict[str, Any]:
        """Return config.json, the layers in today's spelling and the older one; see Target."""
        parts = [
            FFN if layer.mixer is None else {"mamba2": MAMBA}.get(layer.mixer.type, ATTENTION)
            for layer in config.layers
        ]
        return super().export_config(config) | {
            "layers_block_type": [LISTED[part] for part in parts],
            "hybrid_override_pattern": "".join(parts),
            "time_step_min": TINY_STEP,
            "residual_in_fp32": False,
        }

    def import_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Return the model section; see Target."""
        file = NemotronHFile.model_validate(dict(hf))
        if file.time_step_min > TINY_STEP:
            logger.warning(
                "import: transformers clamps step sizes to at least time_step_min=%g, and only "
                "where it reads whole texts; megarec, like the training of these models, does not",
                file.time_step_min,
            )
        own_ffn = {act: own for own, act in self.ffn_acts.items()}
        blocks: dict[str, dict[str, Any]] = {
            MAMBA: {"mixer": self.mixer_tree("mamba2", file)},
            ATTENTION: {"mixer": self.mixer_tree("attention", file) | {"rope": None}},
            FFN: {"ffn": {"type": own_ffn[file.mlp_hidden_act], "d_ff": file.intermediate_size}},
        }
        return ModelConfig.model_validate(self.model_tree(file, blocks, file.pattern()))
