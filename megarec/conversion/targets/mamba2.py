"""Mamba-2 (arXiv 2405.21060) as transformers' `mamba2`: nothing but Mamba-2 layers."""

from collections.abc import Mapping
from typing import Any, Literal

from megarec.config.base import PositiveFloat, PositiveInt
from megarec.config.model import ModelConfig
from megarec.conversion.config_file import NO_LIMIT, ConfigFile, Limit
from megarec.conversion.layers import LayeredTarget


class Mamba2File(ConfigFile):
    """The keys of config.json that shape the model; see ConfigFile."""

    vocab_size: PositiveInt = 32768
    hidden_size: PositiveInt = 4096
    num_hidden_layers: PositiveInt = 64
    tie_word_embeddings: bool = False
    num_heads: PositiveInt = 128
    head_dim: PositiveInt = 64
    state_size: PositiveInt = 128
    n_groups: PositiveInt = 8
    conv_kernel: PositiveInt = 4
    use_conv_bias: bool = True
    chunk_size: PositiveInt = 256
    time_step_limit: Limit = NO_LIMIT
    layer_norm_epsilon: PositiveFloat = 1e-5
    hidden_act: Literal["silu"] = "silu"
    use_bias: Literal[False] = False
    rms_norm: Literal[True] = True


class Mamba2(LayeredTarget):
    """Models whose every block is mamba2 alone, with an inner width that d_model divides."""

    model_type = "mamba2"
    architecture = "Mamba2ForCausalLM"
    layouts = (("mixer",),)
    keys = {
        "mamba2": {
            "num_heads": "num_heads",
            "head_dim": "head_dim",
            "state_dim": "state_size",
            "num_groups": "n_groups",
            "conv_kernel": "conv_kernel",
            "conv_bias": "use_conv_bias",
            "norm_eps": "layer_norm_epsilon",
            "chunk_size": "chunk_size",
            "dt_limit": "time_step_limit",
        }
    }
    fixed = {"mamba2": {}}
    eps_key = "layer_norm_epsilon"
    expand_key = "expand"
    model_names = {
        "embedding.weight": "backbone.embeddings.weight",
        "norm.weight": "backbone.norm_f.weight",
        "head.weight": "lm_head.weight",
    }
    layer_prefix = "backbone.layers."
    block_names = {"mixer_norm.weight": "norm.weight"}
    mixers = {"mamba2": "mixer"}
    # As in the files of state-spaces/mamba2-*.
    old_prefixes = {"backbone.embedding.": "backbone.embeddings."}

    def export_config(self, config: ModelConfig) -> dict[str, Any]:
        """Return config.json; the residual stream keeps its dtype, as in training; see Target."""
        return super().export_config(config) | {"residual_in_fp32": False}

    def import_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Return the model section; see Target."""
        file = Mamba2File.model_validate(dict(hf))
        blocks = {"mamba2": {"mixer": self.mixer_tree("mamba2", file)}}
        pattern = ("mamba2",) * file.num_hidden_layers
        return ModelConfig.model_validate(self.model_tree(file, blocks, pattern))
