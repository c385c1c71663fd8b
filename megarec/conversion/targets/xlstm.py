"""xLSTM (arXiv 2503.13427) as transformers' `xlstm`: xLSTMForCausalLM, weight_mode "single"."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator
from torch import Tensor

from megarec.config.base import PositiveFloat, PositiveInt
from megarec.config.model import BlockConfig, ModelConfig
from megarec.conversion.config_file import ConfigFile
from megarec.conversion.target import (
    Target,
    residual_obstacles,
    scale_obstacles,
    stack_obstacles,
)
from megarec.models.mixers.mlstm import MLSTMConfig

CELL_EPS = 1e-6
"""What both sides add to the cell's denominator."""


class XLSTMFile(ConfigFile):
    """The keys of config.json that shape the model; see ConfigFile."""

    # Of NX-AI/xLSTM-7b and the standalone xlstm package.
    old_keys = {"hidden_size": "embedding_dim", "num_hidden_layers": "num_blocks"}

    vocab_size: PositiveInt = 50304
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_heads: PositiveInt = 8
    qk_dim_factor: PositiveFloat = 0.5
    v_dim_factor: PositiveFloat = 1.0
    ffn_proj_factor: PositiveFloat = 2.667
    ffn_round_up_to_multiple_of: PositiveInt = 64
    gate_soft_cap: PositiveFloat = 15.0
    output_logit_soft_cap: PositiveFloat = 30.0
    norm_eps: PositiveFloat = 1e-6
    eps: float = CELL_EPS
    chunk_size: PositiveInt = 64
    weight_mode: Literal["single", "fused"] = "single"
    use_bias: Literal[False] = False
    add_out_norm: Literal[True] = True
    add_qk_norm: Literal[False] = False

    @field_validator("eps")
    @classmethod
    def _eps_is_fixed(cls, eps: float) -> float:
        if eps != CELL_EPS:
            raise ValueError(f"expected {CELL_EPS}, which is fixed in megarec's cell")
        return eps


class XLSTM(Target):
    """Models whose every block is mlstm and SwiGLU, all of one shape, under a soft-capped head."""

    model_type = "xlstm"
    can_tie = False
    model_names = {
        "embedding.weight": "backbone.embeddings.weight",
        "norm.weight": "backbone.out_norm.weight",
        "head.weight": "lm_head.weight",
    }
    layer_prefix = "backbone.blocks."
    block_names = {
        "mixer_norm.weight": "norm_mlstm.weight",
        "ffn_norm.weight": "norm_ffn.weight",
        "ffn.gate.weight": "ffn.proj_up_gate.weight",
        "ffn.up.weight": "ffn.proj_up.weight",
        "ffn.down.weight": "ffn.proj_down.weight",
    }
    mixers = {"mlstm": "mlstm_layer"}
    # As the standalone xlstm package writes them.
    old_prefixes = {"embedding.": "backbone.embeddings."}

    def obstacles(self, config: ModelConfig) -> list[str]:
        """Name what the architecture lacks; see Target."""
        blocks = {name: config.blocks[name] for name in config.pattern}
        problems = stack_obstacles(config) + [
            f"blocks.{name}.{line}"
            for name, block in blocks.items()
            for line in _block_obstacles(block, config)
        ]
        if not problems and len({_shape(block) for block in blocks.values()}) > 1:
            problems.append(
                f"blocks {', '.join(blocks)} differ in num_heads, qk_dim_factor, v_dim_factor, "
                "gate_soft_cap or d_ff: the architecture has one value for all layers"
            )
        if config.head.soft_cap is None:
            problems.append("head.soft_cap=null: the architecture always caps its logits")
        return problems + scale_obstacles(config)

    def notes(self, config: ModelConfig) -> list[str]:
        """Tell of padding and document boundaries; see Target."""
        mixer, _ = _parts(config.layers[0])
        return [
            "`attention_mask` is ignored: batch sequences of equal length only. Padding on the "
            "left changes the result.",
            "The architecture cannot reset its state inside a row: run one document a row. "
            f"(megarec packs rows and resets: `document_reset: {mixer.document_reset}`.)",
        ]

    def cache_obstacle(self, config: ModelConfig) -> str | None:
        """The layers take int(d_model * factor), their cache that rounded up; see Target."""
        mixer, _ = _parts(config.layers[0])
        d_model = config.d_model
        widths = mixer.qk_dim(d_model), mixer.v_dim(d_model)
        factors = mixer.qk_dim_factor, mixer.v_dim_factor
        if widths == tuple(_rounded_up(d_model, factor, 64) for factor in factors):
            return None
        return (
            f"the cache of the class needs query and value widths that 64 divides, not {widths[0]} "
            f"and {widths[1]}"
        )

    def export_config(self, config: ModelConfig) -> dict[str, Any]:
        """Return config.json, each size under its old and new name; see Target."""
        mixer, d_ff = _parts(config.layers[0])
        factor, multiple = _ffn_keys(config.d_model, d_ff)
        return {
            "architectures": ["xLSTMForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "embedding_dim": config.d_model,
            "num_hidden_layers": config.num_layers,
            "num_blocks": config.num_layers,
            "num_heads": mixer.num_heads,
            "qk_dim_factor": mixer.qk_dim_factor,
            "v_dim_factor": mixer.v_dim_factor,
            "ffn_proj_factor": factor,
            "ffn_round_up_to_multiple_of": multiple,
            "gate_soft_cap": mixer.gate_soft_cap,
            "output_logit_soft_cap": config.head.soft_cap,
            "norm_eps": config.norm.eps,
            "eps": CELL_EPS,
            "norm_reduction_force_float32": True,
            "use_bias": False,
            "add_out_norm": True,
            "weight_mode": "single",
            "tie_word_embeddings": False,
            # mode="train" demands lengths that chunk_size divides, and has no state to return.
            "mode": "inference",
            "return_last_states": True,
            "chunk_size": mixer.chunk_size,
            "chunkwise_kernel": "chunkwise--native_autograd",
            "sequence_kernel": "native_sequence__native",
            "step_kernel": "native",
            "autocast_kernel_dtype": "float32",
            "inference_state_dtype": "float32",
            "max_inference_chunksize": 16384,
        }

    def import_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Return the model section; see Target."""
        file = XLSTMFile.model_validate(dict(hf))
        mixer = {
            "type": "mlstm",
            "num_heads": file.num_heads,
            "qk_dim_factor": file.qk_dim_factor,
            "v_dim_factor": file.v_dim_factor,
            "gate_soft_cap": file.gate_soft_cap,
            "norm_eps": file.norm_eps,
            "chunk_size": file.chunk_size,
        }
        d_ff = _rounded_up(file.hidden_size, file.ffn_proj_factor, file.ffn_round_up_to_multiple_of)
        tree = {
            "vocab_size": file.vocab_size,
            "d_model": file.hidden_size,
            "num_layers": file.num_hidden_layers,
            "blocks": {"mlstm": {"mixer": mixer, "ffn": {"d_ff": d_ff}}},
            "pattern": ["mlstm"],
            "head": {"soft_cap": file.output_logit_soft_cap},
            "norm": {"eps": file.norm_eps},
        }
        return ModelConfig.model_validate(tree)

    def import_tensors(
        self, config: ModelConfig, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Split matrices of weight_mode "fused", then rename; see Target."""
        single: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            single |= _unfused(name, tensor, config)
        return super().import_tensors(config, single)


def _block_obstacles(block: BlockConfig, config: ModelConfig) -> list[str]:
    mixer = block.mixer
    problems = residual_obstacles(block)
    if mixer is None:
        problems.append("mixer=null: every block of the architecture has one")
    elif not isinstance(mixer, MLSTMConfig):
        problems.append(f"mixer.type={mixer.type}: the architecture has mlstm only")
    elif mixer.norm_eps != config.norm.eps:
        problems.append(
            f"mixer.norm_eps={mixer.norm_eps} differs from norm.eps={config.norm.eps}: "
            "the architecture has one for both"
        )
    if block.ffn is None:
        problems.append("ffn=null: every block of the architecture has one")
    elif block.ffn.type != "swiglu":
        problems.append(f"ffn.type={block.ffn.type}: the architecture has swiglu only")
    elif _rounded_up(config.d_model, *_ffn_keys(config.d_model, block.ffn.d_ff)) != block.ffn.d_ff:
        problems.append(f"ffn.d_ff={block.ffn.d_ff}: no ffn_proj_factor gives exactly this width")
    return problems


def _parts(block: BlockConfig) -> tuple[MLSTMConfig, int]:
    """Return the mixer and d_ff of a block without obstacles."""
    assert isinstance(block.mixer, MLSTMConfig) and block.ffn is not None
    return block.mixer, block.ffn.d_ff


def _shape(block: BlockConfig) -> tuple[object, ...]:
    mixer, d_ff = _parts(block)
    return mixer.num_heads, mixer.qk_dim_factor, mixer.v_dim_factor, mixer.gate_soft_cap, d_ff


def _rounded_up(d_model: int, factor: float, multiple: int) -> int:
    """Return d_model * factor, rounded up to a multiple: transformers' formula, in floats."""
    return int(((d_model * factor + multiple - 1) // multiple) * multiple)


def _ffn_keys(d_model: int, d_ff: int) -> tuple[float, int]:
    """Return ffn_proj_factor and ffn_round_up_to_multiple_of that give d_ff.

    The multiple is never 1, which would round a product just below d_ff down.
    """
    return d_ff / d_model, 64 if d_ff % 64 == 0 else d_ff


def _unfused(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Split a matrix of weight_mode "fused" into its blocks of rows; others pass as they are."""
    mixer, d_ff = _parts(config.layers[0])
    qk, v, heads = mixer.qk_dim(config.d_model), mixer.v_dim(config.d_model), mixer.num_heads
    fused = {
        "qkv_opreact": {"q": qk, "k": qk, "v": v, "ogate_preact": v},
        "ifgate_preact": {"igate_preact": heads, "fgate_preact": heads},
        "proj_up_gate_z": {"proj_up_gate": d_ff, "proj_up": d_ff},
    }
    prefix, _, leaf = name.rpartition(".")
    parent, _, layer = prefix.rpartition(".")
    rows = fused.get(layer, {})
    if not rows or tensor.shape[0] != sum(rows.values()):
        return {name: tensor}
    parts = tensor.split(list(rows.values()))
    return {f"{parent}.{single}.{leaf}": part for single, part in zip(rows, parts, strict=True)}
