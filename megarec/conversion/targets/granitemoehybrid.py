"""Granite 4.0 hybrids as transformers' `granitemoehybrid`, dense: a mixer and a SwiGLU a layer."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import model_validator

from megarec.config.base import PositiveFloat, PositiveInt
from megarec.config.model import ModelConfig
from megarec.conversion.config_file import NO_LIMIT, Limit, RotaryKeys, layer_names
from megarec.conversion.layers import LayeredTarget, find_mixer
from megarec.models.mixers.attention import AttentionConfig
from megarec.models.mixers.mamba2 import Mamba2Config

# Names of layers in config.json, of today and of older files -> names of blocks.
LAYERS = {
    "linear_attention": "mamba2",
    "mamba": "mamba2",
    "full_attention": "attention",
    "attention": "attention",
}
# transformers reads both; older ones, vLLM and llama.cpp these.
LISTED = {"mamba2": "mamba", "attention": "attention"}


class GraniteMoeHybridFile(RotaryKeys):
    """The keys of config.json that shape the model; see ConfigFile."""

    old_keys = {"layer_types": "layers_block_type"}

    vocab_size: PositiveInt = 32000
    hidden_size: PositiveInt = 4096
    num_hidden_layers: PositiveInt = 32
    layer_types: Annotated[tuple[str, ...] | None, layer_names(LAYERS)] = None
    tie_word_embeddings: bool = False
    num_attention_heads: PositiveInt = 32
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    position_embedding_type: Literal["rope", "nope"] | None = None
    attention_bias: Literal[False] = False
    mamba_n_heads: PositiveInt = 128
    mamba_n_groups: PositiveInt = 1
    mamba_d_state: PositiveInt = 256
    mamba_d_head: PositiveInt | Literal["auto"] = "auto"
    mamba_d_conv: PositiveInt = 4
    mamba_expand: PositiveInt = 2
    mamba_chunk_size: PositiveInt = 256
    mamba_conv_bias: bool = True
    mamba_proj_bias: Literal[False] = False
    time_step_limit: Limit = NO_LIMIT
    hidden_act: Literal["silu"] = "silu"
    shared_intermediate_size: PositiveInt = 1024
    rms_norm_eps: PositiveFloat = 1e-6
    embedding_multiplier: PositiveFloat = 1.0
    logits_scaling: PositiveFloat = 1.0
    residual_multiplier: PositiveFloat = 1.0
    attention_multiplier: PositiveFloat = 1.0
    # Without the key the class has experts.
    num_local_experts: Literal[0]

    @model_validator(mode="after")
    def _widths_agree(self) -> "GraniteMoeHybridFile":
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers}, but layer_types lists "
                f"{len(self.layer_types)}"
            )
        return self

    def head_width(self) -> int:
        """Return the head dim of the mamba2 layers."""
        if self.mamba_d_head == "auto":
            return self.mamba_expand * self.hidden_size // self.mamba_n_heads
        return self.mamba_d_head


class GraniteMoeHybrid(LayeredTarget):
    """Models whose every block is a mixer, mamba2 or attention, and a SwiGLU."""

    model_type = "granitemoehybrid"
    architecture = "GraniteMoeHybridForCausalLM"
    rank = 1
    layouts = (("mixer", "ffn"),)
    keys = {
        "mamba2": {
            "num_heads": "mamba_n_heads",
            "head_dim": "mamba_d_head",
            "state_dim": "mamba_d_state",
            "num_groups": "mamba_n_groups",
            "conv_kernel": "mamba_d_conv",
            "conv_bias": "mamba_conv_bias",
            "norm_eps": "rms_norm_eps",
            "chunk_size": "mamba_chunk_size",
            "dt_limit": "time_step_limit",
        },
        "attention": {
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
            "max_seq_len": "max_position_embeddings",
            "scale": "attention_multiplier",
        },
    }
    fixed = {"mamba2": {}, "attention": {"window": None, "qk_bias": False, "qk_norm": False}}
    ffn_acts = {"swiglu": "silu"}
    ffn_key = "shared_intermediate_size"
    eps_key = "rms_norm_eps"
    expand_key = "mamba_expand"
    has_factors = True
    cache_needs_attention = True
    model_names = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    layer_prefix = "model.layers."
    block_names = {
        "mixer_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn.gate.weight": "shared_mlp.input_linear.weight",
        "ffn.up.weight": "shared_mlp.input_linear.weight",
        "ffn.down.weight": "shared_mlp.output_linear.weight",
    }
    mixers = {"mamba2": "mamba", "attention": "self_attn"}

    def export_config(self, config: ModelConfig) -> dict[str, Any]:
        """Return config.json; see Target."""
        hf = super().export_config(config) | {
            "num_local_experts": 0,
            "layer_types": [LISTED[mixer.type] for mixer in config.mixers],
            "embedding_multiplier": config.embedding_scale,
            "logits_scaling": 1 / config.head.logit_scale,
            "residual_multiplier": config.layers[0].residual_scale,
        }
        attention = find_mixer(config, AttentionConfig)
        if attention is not None:
            hf["attention_multiplier"] = (
                attention.scale or attention.head_width(config.d_model) ** -0.5
            )
            hf["position_embedding_type"] = None if attention.rope is None else "rope"
        if find_mixer(config, Mamba2Config) is None:
            # The class checks these even where it has no use for them.
            hf |= {"mamba_expand": 1, "mamba_n_heads": 1}
        return hf

    def import_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Return the model section; see Target."""
        file = GraniteMoeHybridFile.model_validate(dict(hf))
        attention = self.mixer_tree("attention", file) | {
            "rope": file.rope_parameters.tree() if file.position_embedding_type == "rope" else None
        }
        mamba2 = self.mixer_tree("mamba2", file) | {"head_dim": file.head_width()}
        block = {
            "ffn": {"d_ff": file.shared_intermediate_size},
            "residual_scale": file.residual_multiplier,
        }
        blocks = {"mamba2": {"mixer": mamba2} | block, "attention": {"mixer": attention} | block}
        pattern = file.layer_types or ("mamba2",) * file.num_hidden_layers
        tree = self.model_tree(file, blocks, pattern)
        tree["embedding_scale"] = file.embedding_multiplier
        tree["head"]["logit_scale"] = 1 / file.logits_scaling
        return ModelConfig.model_validate(tree)
