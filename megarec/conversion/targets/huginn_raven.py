"""Huginn (arXiv 2502.05171) in the layout of its release, `huginn_raven`, and a modeling file."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from megarec.config.base import NonNegativeInt, PositiveFloat, PositiveInt
from megarec.config.depth import LognormalPoissonDepth
from megarec.config.model import BlockConfig, InitConfig, ModelConfig
from megarec.config.stack import LoopedConfig
from megarec.conversion.config_file import ConfigFile
from megarec.conversion.layers import differing_fields, fixed_obstacles, mixer_shape
from megarec.conversion.rope_table import check_rope_table, rope_table
from megarec.conversion.target import Target, residual_obstacles, scale_obstacles
from megarec.models.mixers.attention import AttentionConfig
from megarec.models.rotary import RotaryConfig

TABLE = "freqs_cis"
"""The table of RoPE, which the released code takes from the weights."""
BIAS = ".attn.qk_bias"
INITIAL_STD = (2 / 5) ** 0.5

LOGNORMAL: Literal["poisson-lognormal-filling"] = "poisson-lognormal-filling"
DEPTH = {"type": "lognormal_poisson", "sigma": 0.5, "seed": 514229, "per": "micro_batch"}
"""What the released training code does under that name, with the seed that is written in it."""
TAKASE = InitConfig(std="small", out_std="depth", cut=3.0)

STACK = {
    "inject": "concat",
    "step_signal": None,
    "update": None,
    "initial_state": "random",
    "norm_core_output": True,
    "halt": None,
}
ROPE = {"interleaved": True, "fraction": 1.0, "scaling": None}
"""All that the architecture has of a stack and of RoPE."""


class HuginnFile(ConfigFile):
    """The keys of config.json that shape the model, with the release's defaults; see ConfigFile."""

    old_keys = {
        "n_embd": "hidden_size",
        "n_heads": "num_attention_heads",
        "tie_embeddings": "tie_word_embeddings",
    }

    n_embd: PositiveInt = 5280
    n_heads: PositiveInt = 55
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    intermediate_size: PositiveInt = 17920
    block_size: PositiveInt = 4096
    vocab_size: PositiveInt = 65536
    padded_vocab_size: PositiveInt | None = None
    tie_embeddings: bool = True
    qk_bias: bool = True
    bias: Literal[False] = False
    norm_eps: PositiveFloat = 1e-6
    rope_base: PositiveFloat = 50_000.0
    architecture_class_name: Literal["RecurrentGPT"] = "RecurrentGPT"
    block_class_name: Literal["SandwichBlock"] = "SandwichBlock"
    mlp_class_name: Literal["GatedMLP"] = "GatedMLP"
    nonlin_name: Literal["SiLU"] = "SiLU"
    norm_class_name: Literal["RMSNorm_llama"] = "RMSNorm_llama"
    injection_type: Literal["linear"] = "linear"
    n_layers_in_prelude: NonNegativeInt = 2
    n_layers_in_recurrent_block: PositiveInt = 4
    n_layers_in_coda: NonNegativeInt = 2
    mean_recurrence: PositiveInt = 32
    mean_backprop_depth: PositiveInt = 8
    sampling_scheme: Literal["poisson-lognormal-filling", "fixed"] = LOGNORMAL
    state_init: Literal["like-init"] = "like-init"
    init_strategy: str = "takase"
    init_values: dict[str, float] = {}
    test_time_noise: Annotated[float, Field(ge=0, le=0)] = 0.0

    @field_validator("num_key_value_heads")
    @classmethod
    def _heads_agree(cls, heads: int | None, info: ValidationInfo) -> int | None:
        if heads not in (None, info.data.get("n_heads", heads)):
            raise ValueError(f"expected as many as n_heads={info.data['n_heads']}")
        return heads

    @field_validator("head_dim")
    @classmethod
    def _width_agrees(cls, width: int | None, info: ValidationInfo) -> int | None:
        d_model, heads = info.data.get("n_embd"), info.data.get("n_heads")
        if width is not None and d_model and heads and width * heads != d_model:
            raise ValueError(f"expected n_embd={d_model} / n_heads={heads}")
        return width

    @field_validator("init_values")
    @classmethod
    def _scales_agree(cls, values: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        """Embeddings and latent states are scaled by these; the rest concerns initial weights."""
        d_model = info.data.get("n_embd")
        expected = (
            {}
            if d_model is None
            else {"embed_scale": d_model**0.5, "std": (2 / (5 * d_model)) ** 0.5}
        )
        problems = [
            f"{key}={values[key]}: expected {value:.9g}"
            for key, value in expected.items()
            if not math.isclose(values.get(key, value), value, rel_tol=1e-6)
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return values


class HuginnRaven(Target):
    """Looped stacks of sandwich-norm attention and SwiGLU, exactly as Huginn's."""

    model_type = "huginn_raven"
    rank = 5
    model_names = {
        "embedding.weight": "transformer.wte.weight",
        "stack.adapter.weight": "transformer.adapter.weight",
        "norm.weight": "transformer.ln_f.weight",
        "head.weight": "lm_head.weight",
    }
    block_names = {
        "mixer_norm.weight": "norm_1.weight",
        "mixer_residual.norm.weight": "norm_2.weight",
        "ffn_norm.weight": "norm_3.weight",
        "ffn_residual.norm.weight": "norm_4.weight",
        "ffn.gate.weight": "mlp.fc.weight",
        "ffn.up.weight": "mlp.fc.weight",
        "ffn.down.weight": "mlp.proj.weight",
    }
    mixers = {"attention": "attn"}
    stacks = ("looped",)
    leaf_names = {
        "q_proj.weight": "Wqkv.weight",
        "k_proj.weight": "Wqkv.weight",
        "v_proj.weight": "Wqkv.weight",
        "o_proj.weight": "proj.weight",
        "q_proj.bias": "qk_bias",
        "k_proj.bias": "qk_bias",
    }
    # Of the released training code's checkpoints.
    old_prefixes = {"_orig_mod._original_module.": ""}
    dtype_keys = ("dtype", "torch_dtype")
    modeling_file = "modeling_huginn.py"

    def obstacles(self, config: ModelConfig) -> list[str]:
        """Name what the architecture lacks; see Target."""
        d_model, stack = config.d_model, config.stack
        blocks = {name: config.blocks[name] for name in config.pattern}
        problems = [
            f"blocks.{name}.{line}"
            for name, block in blocks.items()
            for line in _block_obstacles(block, d_model)
        ]
        differing = [] if problems else differing_fields(list(blocks.values()), d_model)
        if differing:
            problems.append(
                f"blocks {', '.join(blocks)} differ in {', '.join(differing)}: the architecture "
                "has one value for all layers"
            )
        scales = {"embedding_scale": (config.embedding_scale, d_model**0.5)}
        if isinstance(stack, LoopedConfig):
            problems += [f"stack.{line}" for line in fixed_obstacles(dict(stack), STACK)]
            scales["stack.initial_std"] = (stack.initial_std, INITIAL_STD)
        else:
            problems.append(f"stack={stack.type}: the architecture iterates its core")
        problems += [
            f"{key}={got}: the architecture has {expected} only"
            for key, (got, expected) in scales.items()
            if not math.isclose(got, expected, rel_tol=1e-9)
        ]
        if config.head.soft_cap is not None:
            problems.append(
                f"head.soft_cap={config.head.soft_cap}: the architecture does not cap its logits"
            )
        return problems + scale_obstacles(config.model_copy(update={"embedding_scale": 1.0}))

    def notes(self, config: ModelConfig) -> list[str]:
        """Tell of depth, latent states, padding and the released code; see Target."""
        stack = _stack(config)
        notes = [
            "`num_steps=...`, in a call or in `generate`, says how often the core iterates; by "
            f"default {stack.num_recurrences} times (`mean_recurrence`).",
            "A token's initial latent state is drawn from its position, so that results are "
            "reproducible; `input_states=...` replaces it.",
            "Texts of unequal length in one batch: pad them on the left "
            '(`tokenizer.pad_token = tokenizer.eos_token`, `tokenizer.padding_side = "left"`) and '
            "pass the `attention_mask`. Padding changes no result.",
            "Documents are not kept apart inside a row: run one document a row.",
            "Names, shapes and `config.json` are those of the released Huginn, whose code reads "
            f"these weights, too, if `auto_map` names it. It needs the table `{TABLE}` among them, "
            "which `save_pretrained` of the modeling file here, which does not, leaves out.",
        ]
        if stack.cache.type != "full":
            notes.append(
                f"megarec decoded with `cache: {stack.cache.type}`; here every step's keys are "
                "kept, which computes what a call on the whole text computes."
            )
        return notes

    def layer_name(self, i: int, config: ModelConfig) -> str:
        """Return the name of a layer in its part of the stack; see Target."""
        core = _stack(config).core_blocks
        if i < core.start:
            return f"transformer.prelude.{i}"
        if i < core.stop:
            return f"transformer.core_block.{i - core.start}"
        return f"transformer.coda.{i - core.stop}"

    def export_config(self, config: ModelConfig) -> dict[str, Any]:
        """Return config.json; of training, only what has a name in the release; see Target."""
        stack, mixer = _stack(config), _mixer(config)
        rope, _, block_size = _rope(config)
        module = self.modeling_file.removesuffix(".py")
        ffn = config.layers[0].ffn
        assert ffn is not None
        hf = {
            "architectures": ["RavenForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{module}.RavenConfig",
                "AutoModelForCausalLM": f"{module}.RavenForCausalLM",
            },
            "model_type": self.model_type,
            "architecture_class_name": "RecurrentGPT",
            "block_class_name": "SandwichBlock",
            "mlp_class_name": "GatedMLP",
            "nonlin_name": "SiLU",
            "norm_class_name": "RMSNorm_llama",
            "injection_type": "linear",
            "state_init": "like-init",
            "n_embd": config.d_model,
            "n_heads": mixer.num_heads,
            "num_key_value_heads": mixer.num_heads,
            "intermediate_size": ffn.d_ff,
            "block_size": block_size,
            "vocab_size": config.vocab_size,
            "padding_multiple": math.gcd(config.vocab_size, 4096),
            "tie_embeddings": config.head.tie_embeddings,
            "bias": False,
            "qk_bias": mixer.qk_bias,
            "norm_eps": config.norm.eps,
            "rope_base": rope.base,
            "n_layers": config.num_layers,
            "n_layers_in_prelude": stack.prelude,
            "n_layers_in_recurrent_block": stack.core,
            "n_layers_in_coda": stack.coda,
            "mean_recurrence": stack.num_recurrences,
            "mean_backprop_depth": stack.backprop or stack.num_recurrences,
            "sampling_scheme": LOGNORMAL if _is_lognormal(stack) else "fixed",
            "activation_checkpoint_impl": "per-iteration",
        }
        return hf | ({"init_strategy": "takase"} if config.init == TAKASE else {})

    def import_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Return the model section; see Target."""
        file = HuginnFile.model_validate(dict(hf))
        prelude, core = file.n_layers_in_prelude, file.n_layers_in_recurrent_block
        lognormal = file.sampling_scheme == LOGNORMAL
        truncated = lognormal or file.mean_backprop_depth < file.mean_recurrence
        mixer = {
            "type": "attention",
            "num_heads": file.n_heads,
            "qk_bias": file.qk_bias,
            "rope": ROPE | {"base": file.rope_base},
            "max_seq_len": file.block_size,
        }
        block = {
            "mixer": mixer,
            "ffn": {"d_ff": file.intermediate_size},
            "norm_placement": "sandwich",
        }
        stack = STACK | {
            "type": "looped",
            "prelude": prelude,
            "core": core,
            "coda": file.n_layers_in_coda,
            "num_recurrences": file.mean_recurrence,
            "depth": DEPTH | {"mean": file.mean_recurrence} if lognormal else None,
            "backprop": file.mean_backprop_depth if truncated else None,
        }
        tree = {
            "vocab_size": file.padded_vocab_size or file.vocab_size,
            "d_model": file.n_embd,
            "num_layers": prelude + core + file.n_layers_in_coda,
            "blocks": {"attention": block},
            "pattern": ["attention"],
            "stack": stack,
            "embedding_scale": file.n_embd**0.5,
            "head": {"tie_embeddings": file.tie_embeddings},
            "norm": {"eps": file.norm_eps},
            "init": TAKASE if file.init_strategy == "takase" else InitConfig(),
        }
        return ModelConfig.model_validate(tree)

    def export_tensors(
        self, config: ModelConfig, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Give each head its row of biases, and add the table of RoPE; see Target."""
        heads = _mixer(config).num_heads
        joined = super().export_tensors(config, tensors)
        shaped = {
            name: tensor.view(2, 1, heads, -1) if name.endswith(BIAS) else tensor
            for name, tensor in joined.items()
        }
        return shaped | {TABLE: rope_table(*_rope(config))}

    def import_tensors(
        self, config: ModelConfig, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Split, rename, and compare the table of RoPE, where there is one; see Target.

        Raises:
            UserError: it is that of other positions.
        """
        flat = {
            name: tensor.flatten() if name.endswith(BIAS) else tensor
            for name, tensor in tensors.items()
        }
        own = super().import_tensors(config, flat)
        table = own.pop(TABLE, None)
        if table is not None:
            check_rope_table(TABLE, table, *_rope(config))
        return own


def _block_obstacles(block: BlockConfig, d_model: int) -> list[str]:
    problems = residual_obstacles(block.model_copy(update={"norm_placement": "pre"}))
    problems += fixed_obstacles(dict(block), {"norm_placement": "sandwich"})
    if block.ffn is None:
        problems.append("ffn=null: every block of the architecture has one")
    elif block.ffn.type != "swiglu":
        problems.append(f"ffn.type={block.ffn.type}: the architecture has swiglu only")
    if block.mixer is None:
        return [*problems, "mixer=null: every block of the architecture has one"]
    if not isinstance(block.mixer, AttentionConfig):
        line = f"mixer.type={block.mixer.type}: the architecture has attention only"
        return [*problems, line]
    return problems + [f"mixer.{line}" for line in _attention_obstacles(block.mixer, d_model)]


def _attention_obstacles(mixer: AttentionConfig, d_model: int) -> list[str]:
    shape, heads = mixer_shape(mixer, d_model), mixer.num_heads
    fixed = {"num_kv_heads": heads, "window": None, "qk_norm": False, "scale": None}
    problems = fixed_obstacles(shape, fixed)
    if shape["head_dim"] * heads != d_model:
        problems.append(
            f"num_heads={heads} x head_dim={shape['head_dim']}: the architecture demands "
            f"d_model={d_model}"
        )
    if mixer.rope is None:
        return [*problems, "rope=null: the architecture always has positions"]
    return problems + [f"rope.{line}" for line in fixed_obstacles(dict(mixer.rope), ROPE)]


def _stack(config: ModelConfig) -> LoopedConfig:
    """Return the stack of a model without obstacles."""
    assert isinstance(config.stack, LoopedConfig)
    return config.stack


def _mixer(config: ModelConfig) -> AttentionConfig:
    """Return the mixer of every layer of a model without obstacles."""
    mixer = config.layers[0].mixer
    assert isinstance(mixer, AttentionConfig)
    return mixer


def _rope(config: ModelConfig) -> tuple[RotaryConfig, int, int]:
    """Return RoPE, the width of a head and the number of positions."""
    mixer = _mixer(config)
    assert mixer.rope is not None
    return mixer.rope, mixer.head_width(config.d_model), mixer.max_seq_len


def _is_lognormal(stack: LoopedConfig) -> bool:
    depth = stack.depth
    if not isinstance(depth, LognormalPoissonDepth):
        return False
    return depth.mean == stack.num_recurrences and depth.sigma == DEPTH["sigma"]
