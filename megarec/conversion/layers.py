"""Targets whose layers are mamba2, attention and FFNs, each of one shape in all of a model."""

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from megarec.config.base import StrictModel
from megarec.config.mixer import MixerConfig
from megarec.config.model import BlockConfig, ModelConfig
from megarec.conversion.config_file import (
    NO_LIMIT,
    ConfigFile,
    limit_to_json,
    rope_keys,
    rope_obstacles,
)
from megarec.conversion.target import (
    Target,
    residual_obstacles,
    scale_obstacles,
    stack_obstacles,
)
from megarec.models.mixers.attention import AttentionConfig
from megarec.models.mixers.mamba2 import Mamba2Config

M = TypeVar("M", bound=MixerConfig)

# Fields of mixers that matter to training only, or that name the class.
NOT_SHAPE = {"type", "dt_init", "dt_init_floor"}
ONE_DOCUMENT = (
    "The Mamba-2 layers cannot reset their state inside a row without the package "
    "`causal_conv1d`: run one document a row."
)


class LayeredTarget(Target):
    """A target of layers of a few kinds, with one value of each key for all layers of a kind.

    Attributes:
        architecture: the class of transformers.
        layouts: the parts of a layer, one tuple for each way to build one.
        keys: type of mixer -> own field -> key of config.json.
        fixed: type of mixer -> own field -> the only value that the architecture has.
        ffn_acts: own type of FFN -> name of its activation there.
        act_key: key of that name.
        ffn_key: key of the FFN's width.
        eps_key: key of the epsilon of all norms.
        expand_key: key of the inner width of mamba2 layers over d_model, if it must be whole.
        has_factors: there are factors on embeddings, logits and residual branches.
        cache_needs_attention: the class asks its attention layers how long the cached text is.
    """

    architecture: ClassVar[str]
    layouts: ClassVar[tuple[tuple[str, ...], ...]]
    keys: ClassVar[dict[str, dict[str, str]]]
    fixed: ClassVar[dict[str, dict[str, Any]]]
    ffn_acts: ClassVar[dict[str, str]] = {}
    act_key: ClassVar[str] = "hidden_act"
    ffn_key: ClassVar[str] = "intermediate_size"
    eps_key: ClassVar[str]
    expand_key: ClassVar[str | None] = None
    has_factors: ClassVar[bool] = False
    cache_needs_attention: ClassVar[bool] = False

    def obstacles(self, config: ModelConfig) -> list[str]:
        """Name what the architecture lacks; see Target."""
        blocks = {name: config.blocks[name] for name in config.pattern}
        problems = stack_obstacles(config) + [
            f"blocks.{name}.{line}"
            for name, block in blocks.items()
            for line in self._block_obstacles(block, config)
        ]
        differing = [] if problems else differing_fields(list(blocks.values()), config.d_model)
        if differing:
            problems.append(
                f"blocks {', '.join(blocks)} differ in {', '.join(differing)}: the architecture "
                "has one value for all layers"
            )
        if config.head.soft_cap is not None:
            problems.append(
                f"head.soft_cap={config.head.soft_cap}: the architecture does not cap its logits"
            )
        return problems + ([] if self.has_factors else scale_obstacles(config))

    def _block_obstacles(self, block: BlockConfig, config: ModelConfig) -> list[str]:
        problems = residual_obstacles(block)
        parts = tuple(part for part in ("mixer", "ffn") if getattr(block, part) is not None)
        if parts not in self.layouts:
            wanted = " or ".join(" and ".join(layout) for layout in self.layouts)
            problems.append(f"{' and '.join(parts)}: a layer of the architecture is {wanted}")
        if block.ffn is not None and self.ffn_acts and block.ffn.type not in self.ffn_acts:
            known = ", ".join(self.ffn_acts)
            problems.append(f"ffn.type={block.ffn.type}: the architecture has {known} only")
        if block.mixer is None:
            return problems
        if block.mixer.type not in self.keys:
            known = ", ".join(self.keys)
            line = f"mixer.type={block.mixer.type}: the architecture has {known} only"
            return [*problems, line]
        return problems + [f"mixer.{line}" for line in self.mixer_obstacles(block.mixer, config)]

    def mixer_obstacles(self, mixer: MixerConfig, config: ModelConfig) -> list[str]:
        """Name what the architecture lacks of a mixer whose type it has, one line each."""
        shape = mixer_shape(mixer, config.d_model)
        problems = fixed_obstacles(shape, self.fixed[mixer.type])
        if "norm_eps" in self.keys[mixer.type] and shape["norm_eps"] != config.norm.eps:
            problems.append(
                f"norm_eps={shape['norm_eps']} differs from norm.eps={config.norm.eps}: the "
                "architecture has one for both"
            )
        rope = None if "rope" in self.fixed[mixer.type] else shape.get("rope")
        if rope is not None:
            problems += [f"rope.{line}" for line in rope_obstacles(rope)]
        if self.expand_key and isinstance(mixer, Mamba2Config) and mixer.inner() % config.d_model:
            problems.append(
                f"num_heads={mixer.num_heads} x head_dim={mixer.head_dim}: the architecture "
                f"demands a multiple of d_model={config.d_model}"
            )
        return problems

    def notes(self, config: ModelConfig) -> list[str]:
        """Tell of document boundaries; see Target."""
        return [ONE_DOCUMENT] if find_mixer(config, Mamba2Config) else []

    def cache_obstacle(self, config: ModelConfig) -> str | None:
        """Say what the class lacks where it reads single tokens; see Target."""
        if self.cache_needs_attention and find_mixer(config, AttentionConfig) is None:
            return "the cache of the class needs a layer of attention"
        mixer = find_mixer(config, Mamba2Config)
        if mixer is None or mixer.dt_limit == NO_LIMIT:
            return None
        low, high = mixer.dt_limit
        return f"the class ignores time_step_limit=[{low}, {high}] when it reads a single token"

    def export_config(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys that all of these targets have; see Target."""
        hf: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.num_layers,
            self.eps_key: config.norm.eps,
            "tie_word_embeddings": config.head.tie_embeddings and self.can_tie,
        }
        for block in config.layers:
            if block.mixer is not None:
                hf |= self._mixer_keys(block.mixer, config.d_model)
            if block.ffn is not None:
                hf |= {self.ffn_key: block.ffn.d_ff, self.act_key: self.ffn_acts[block.ffn.type]}
        return hf

    def _mixer_keys(self, mixer: MixerConfig, d_model: int) -> dict[str, Any]:
        shape = mixer_shape(mixer, d_model)
        hf = {key: shape[own] for own, key in self.keys[mixer.type].items()}
        if "time_step_limit" in hf:
            hf["time_step_limit"] = limit_to_json(hf["time_step_limit"])
        if shape.get("rope") is not None:
            hf |= rope_keys(shape["rope"])
        if self.expand_key and isinstance(mixer, Mamba2Config):
            hf[self.expand_key] = mixer.inner() // d_model
        return hf

    def mixer_tree(self, type: str, file: ConfigFile) -> dict[str, Any]:
        """Return the mapping of a mixer's config, as far as `keys` goes."""
        values = {own: getattr(file, key) for own, key in self.keys[type].items()}
        return {"type": type} | values

    def model_tree(
        self, file: Any, blocks: Mapping[str, dict[str, Any]], pattern: tuple[str, ...]
    ) -> dict[str, Any]:
        """Return the mapping of a model section without factors.

        Args:
            file: of the target.
            blocks: a mapping for each kind that there may be.
            pattern: the block of each layer.
        """
        return {
            "vocab_size": file.vocab_size,
            "d_model": file.hidden_size,
            "num_layers": len(pattern),
            "blocks": {name: blocks[name] for name in dict.fromkeys(pattern)},
            "pattern": pattern if len(set(pattern)) > 1 else pattern[:1],
            "head": {"tie_embeddings": self.can_tie and file.tie_word_embeddings},
            "norm": {"eps": getattr(file, self.eps_key)},
        }


def mixer_shape(mixer: MixerConfig, d_model: int) -> dict[str, Any]:
    """Return the fields of a mixer that change what it computes, with their defaults filled in.

    The scale of attention scores is None where it is the ordinary one.
    """
    shape = {field: value for field, value in mixer if field not in NOT_SHAPE}
    if isinstance(mixer, AttentionConfig):
        width = mixer.head_width(d_model)
        shape |= {"num_kv_heads": mixer.kv_heads(), "head_dim": width}
        shape["scale"] = None if mixer.scale == width**-0.5 else mixer.scale
        if not mixer.qk_norm:
            del shape["norm_eps"]
    return shape


def differing_fields(blocks: list[BlockConfig], d_model: int) -> list[str]:
    """Return what differs between blocks that have it."""
    values: dict[str, set[Any]] = {}
    for block in blocks:
        facts: dict[str, Any] = {"residual_scale": block.residual_scale}
        if block.mixer is not None:
            shape = mixer_shape(block.mixer, d_model)
            facts |= {f"{block.mixer.type}.{field}": x for field, x in shape.items()}
        if block.ffn is not None:
            facts |= {"ffn.type": block.ffn.type, "ffn.d_ff": block.ffn.d_ff}
        for key, value in facts.items():
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def fixed_obstacles(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[str]:
    """Name the fields that differ from the only value that an architecture has."""
    return [
        f"{field}={_shown(values[field])}: the architecture has {_shown(value)} only"
        for field, value in fixed.items()
        if values[field] != value
    ]


def _shown(value: Any) -> str:
    if isinstance(value, StrictModel):
        return value.model_dump_json()
    return "null" if value is None else str(value)


def find_mixer(config: ModelConfig, kind: type[M]) -> M | None:
    """Return the first mixer of a kind; None if there is none."""
    return next((mixer for mixer in config.mixers if isinstance(mixer, kind)), None)
