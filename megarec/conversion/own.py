"""Targets that transformers has no class for: their exports carry a modeling file.

config.json holds the whole model section, so that import restores it as it was; width, depth and
tied embeddings stand under the names that transformers gives them.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from megarec.config.base import PositiveInt
from megarec.config.model import BlockConfig, ModelConfig
from megarec.conversion.config_file import INFINITY, ConfigFile
from megarec.conversion.target import Target, residual_obstacles, stack_obstacles
from megarec.errors import UserError
from megarec.models.backbone import build_stack

BLOCK_NAMES = (
    "skip.weight",
    "mixer_norm.weight",
    "ffn_norm.weight",
    "ffn.gate.weight",
    "ffn.up.weight",
    "ffn.down.weight",
    "mixer_residual.norm.weight",
    "mixer_residual.scale.weight",
    "ffn_residual.norm.weight",
    "ffn_residual.scale.weight",
)


class OwnFile(ConfigFile):
    """The keys that every modeling file reads, so that none may be missing; see ConfigFile."""

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    tie_word_embeddings: bool
    embedding_scale: float
    blocks: dict[str, Any]
    pattern: list[str]
    head: dict[str, Any]
    norm: dict[str, Any]


class OwnTarget(Target):
    """A target with a modeling file of ours, in which parameters have their names in megarec.

    A subclass names its mixers, the file and the classes in it; the prefix of every mixer is
    "mixer". Classes that ship with transformers are preferred to it.

    Attributes:
        config_class: of the modeling file.
        model_class: of the modeling file, for causal language modeling.
        norm_placements: that its blocks may have.
        has_layer_scale: its blocks may have a `layer_scale`.
    """

    rank = 10
    modeling_file: ClassVar[str]
    config_class: ClassVar[str]
    model_class: ClassVar[str]
    norm_placements: ClassVar[tuple[str, ...]] = ("pre",)
    has_layer_scale: ClassVar[bool] = False
    model_names = {name: name for name in ("embedding.weight", "norm.weight", "head.weight")}
    layer_prefix = "blocks."
    block_names = {name: name for name in BLOCK_NAMES}

    def obstacles(self, config: ModelConfig) -> list[str]:
        """Name what the modeling file does not have; see Target."""
        blocks = {name: config.blocks[name] for name in config.pattern}
        mixers = {name: block.mixer for name, block in blocks.items()}
        problems = []
        if config.stack.type not in self.stacks:
            problems = stack_obstacles(config) or [
                f"stack={config.stack.type}: {self.modeling_file} has {', '.join(self.stacks)} only"
            ]
        for name, block in blocks.items():
            lines = residual_obstacles(block.model_copy(update=self._plain(block)))
            problems += [f"blocks.{name}.{line}" for line in lines]
        return problems + [
            f"blocks.{name}.mixer.type={mixer.type}: {self.modeling_file} has "
            f"{', '.join(self.mixers)} only"
            for name, mixer in mixers.items()
            if mixer is not None and mixer.type not in self.mixers
        ]

    def _plain(self, block: BlockConfig) -> dict[str, Any]:
        """Return the keys of a block without what the file has of residual streams."""
        plain: dict[str, Any] = {"learned_skip": False}
        if block.norm_placement in self.norm_placements:
            plain["norm_placement"] = "pre"
        if self.has_layer_scale:
            plain["layer_scale"] = None
        return plain

    def names(self, config: ModelConfig) -> dict[str, str]:
        """Return the names; parameters beside the blocks keep theirs. See Target."""
        with torch.device("meta"):
            stack = build_stack(config)
        names = [f"stack.{name}" for name, _ in stack.named_parameters()]
        return super().names(config) | {name: name for name in names}

    def export_config(self, config: ModelConfig) -> dict[str, Any]:
        """Return config.json, with the classes that transformers finds in the file; see Target."""
        module = self.modeling_file.removesuffix(".py")
        tree = _encode(config.model_dump(mode="json"))
        return {
            "architectures": [self.model_class],
            "auto_map": {
                "AutoConfig": f"{module}.{self.config_class}",
                "AutoModelForCausalLM": f"{module}.{self.model_class}",
            },
            "model_type": self.model_type,
            "hidden_size": tree.pop("d_model"),
            "num_hidden_layers": tree.pop("num_layers"),
            "tie_word_embeddings": tree["head"].pop("tie_embeddings"),
            **tree,
        }

    def import_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Return the model section, without a look at the modeling file; see Target."""
        file = OwnFile.model_validate(dict(hf))
        tree = {key: _decode(hf[key]) for key in ModelConfig.model_fields if key in hf}
        tree |= {"d_model": file.hidden_size, "num_layers": file.num_hidden_layers}
        tree["head"] = tree["head"] | {"tie_embeddings": file.tie_word_embeddings}
        config = ModelConfig.model_validate(tree)
        problems = self.obstacles(config)
        if problems:
            raise UserError(*problems)
        return config


def _encode(value: Any) -> Any:
    """Return a tree with infinity spelled as transformers does: JSON has none."""
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    return INFINITY if value == math.inf else value


def _decode(value: Any) -> Any:
    if value == INFINITY:
        return math.inf
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value
