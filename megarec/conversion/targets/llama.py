"""Transformers with RoPE and SwiGLU as transformers' `llama` and, with a window, `mistral`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from megarec.config.base import PositiveFloat, PositiveInt
from megarec.config.mixer import MixerConfig
from megarec.config.model import ModelConfig
from megarec.conversion.config_file import RotaryKeys
from megarec.conversion.layers import LayeredTarget
from megarec.models.mixers.attention import AttentionConfig


class LlamaFile(RotaryKeys):
    """The keys of config.json that shape the model; see ConfigFile."""

    vocab_size: PositiveInt = 32000
    hidden_size: PositiveInt = 4096
    intermediate_size: PositiveInt = 11008
    num_hidden_layers: PositiveInt = 32
    tie_word_embeddings: bool = False
    num_attention_heads: PositiveInt = 32
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: PositiveFloat = 1e-6


class MistralFile(LlamaFile):
    """The keys of config.json that shape the model; see ConfigFile."""

    intermediate_size: PositiveInt = 14336
    num_key_value_heads: PositiveInt | None = 8
    max_position_embeddings: PositiveInt = 131072
    sliding_window: PositiveInt | None = 4096
    # Ministral's, whose layers differ.
    layer_types: None = None


class LlamaLike(LayeredTarget):
    """Models whose every block is attention with RoPE and a SwiGLU, under Llama's names."""

    file: ClassVar[type[LlamaFile]]
    layouts = (("mixer", "ffn"),)
    keys = {
        "attention": {
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
            "max_seq_len": "max_position_embeddings",
        }
    }
    ffn_acts = {"swiglu": "silu"}
    eps_key = "rms_norm_eps"
    model_names = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    layer_prefix = "model.layers."
    block_names = {
        "mixer_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn.gate.weight": "mlp.gate_proj.weight",
        "ffn.up.weight": "mlp.up_proj.weight",
        "ffn.down.weight": "mlp.down_proj.weight",
    }
    mixers = {"attention": "self_attn"}
    unused = (".rotary_emb.inv_freq",)

    def mixer_obstacles(self, mixer: MixerConfig, config: ModelConfig) -> list[str]:
        """Ask for positions, too; see LayeredTarget."""
        problems = super().mixer_obstacles(mixer, config)
        if isinstance(mixer, AttentionConfig) and mixer.rope is None:
            problems.append("rope=null: the architecture always has positions")
        return problems

    def import_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Return the model section; see Target."""
        file = self.file.model_validate(dict(hf))
        attention = self.mixer_tree("attention", file) | {"rope": file.rope_parameters.tree()}
        blocks = {"attention": {"mixer": attention, "ffn": {"d_ff": file.intermediate_size}}}
        pattern = ("attention",) * file.num_hidden_layers
        return ModelConfig.model_validate(self.model_tree(file, blocks, pattern))


class Llama(LlamaLike):
    """Models without a window, whose heads divide d_model."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    file = LlamaFile
    fixed = {"attention": {"window": None, "qk_bias": False, "qk_norm": False, "scale": None}}

    def mixer_obstacles(self, mixer: MixerConfig, config: ModelConfig) -> list[str]:
        """Ask for heads that divide d_model, too; see LayeredTarget."""
        problems = super().mixer_obstacles(mixer, config)
        if isinstance(mixer, AttentionConfig) and config.d_model % mixer.num_heads:
            problems.append(
                f"num_heads={mixer.num_heads}: the architecture demands a divisor of "
                f"d_model={config.d_model}"
            )
        return problems


class Mistral(LlamaLike):
    """Models with a window, or none."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    file = MistralFile
    keys = {"attention": LlamaLike.keys["attention"] | {"window": "sliding_window"}}
    fixed = {"attention": {"qk_bias": False, "qk_norm": False, "scale": None}}
