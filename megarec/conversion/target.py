"""The target contract: what megarec must know of one Hugging Face architecture."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from megarec.config.model import BlockConfig, ModelConfig
from megarec.errors import UserError
from megarec.models.backbone import Backbone
from megarec.models.block import Block


class Target(ABC):
    """One `model_type` of transformers. A subclass registers itself under it.

    Every module in ``megarec/conversion/targets`` is found by itself, so a new target is one file.
    Configs are plain JSON values; tensors are keyed by parameter names. Own parameter names and
    `model_type`'s differ; only the target knows both.

    Attributes:
        model_type: of config.json.
        rank: of two targets that can represent a model, the one with the lower rank is taken.
        can_tie: the architecture can share one matrix between embeddings and head; where it
            cannot, tied embeddings are exported as a head of their own.
        model_names: own name -> name there, of the parameters outside of the layers.
        layer_prefix: of the parameters of layer 0, 1, ... there, before the number.
        block_names: own name -> name there, of a layer's parameters outside of its mixer.
        mixers: type of mixer -> prefix of its parameters in a layer there, for all that it has.
        stacks: types of stack that it has.
        leaf_names: name of a mixer's parameter by its hf_names() -> name there, where it differs.
        old_prefixes: beginnings of names in older files -> what they are now.
        unused: endings of names in older files that mean nothing.
        dtype_keys: of config.json.
        modeling_file: name of a file in ``megarec/conversion/modeling`` that exports carry, where
            transformers has no class of its own. It is plain source for users: megarec copies it
            and never runs it. All but those of released layouts subclass ``OwnTarget``.
    """

    model_type: ClassVar[str]
    rank: ClassVar[int] = 0
    can_tie: ClassVar[bool] = True
    model_names: ClassVar[dict[str, str]]
    layer_prefix: ClassVar[str]
    block_names: ClassVar[dict[str, str]]
    mixers: ClassVar[dict[str, str]]
    stacks: ClassVar[tuple[str, ...]] = ("sequential",)
    leaf_names: ClassVar[dict[str, str]] = {}
    old_prefixes: ClassVar[dict[str, str]] = {}
    unused: ClassVar[tuple[str, ...]] = ()
    dtype_keys: ClassVar[tuple[str, ...]] = ("dtype",)
    modeling_file: ClassVar[str | None] = None
    members: ClassVar[dict[str, type["Target"]]] = {}

    def __init_subclass__(cls) -> None:
        # A base of several targets has no model_type of its own.
        if "model_type" in vars(cls):
            Target.members[cls.model_type] = cls

    @abstractmethod
    def obstacles(self, config: ModelConfig) -> list[str]:
        """Say what of a model the architecture cannot represent, one line each; [] if nothing."""

    @abstractmethod
    def export_config(self, config: ModelConfig) -> dict[str, Any]:
        """Return config.json of a model without obstacles, but for token ids, dtype, use_cache."""

    @abstractmethod
    def import_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Return the model section for a config.json of this or an older layout.

        Raises:
            ValidationError: pydantic's, with every key that megarec cannot represent.
            UserError: a model that the architecture cannot represent.
        """

    def notes(self, config: ModelConfig) -> list[str]:
        """Say what users of the export must know, a sentence each; it stands on the model card."""
        return []

    def cache_obstacle(self, config: ModelConfig) -> str | None:
        """Say why the architecture's cache is wrong for a model; None if it serves."""
        return None

    def names(self, config: ModelConfig) -> dict[str, str]:
        """Return own parameter name -> the architecture's, for every parameter of a model.

        Parameters of one name there are one tensor: joined along their first dim, in this order.
        """
        names = dict(self.model_names)
        if config.head.tie_embeddings:
            del names["head.weight"]
        blocks = {name: self._layer_names(config.blocks[name], config) for name in config.pattern}
        for i in range(config.num_layers):
            block = blocks[config.pattern[i % len(config.pattern)]]
            names |= {
                f"blocks.{i}.{own}": f"{self.layer_name(i, config)}.{theirs}"
                for own, theirs in block.items()
            }
        return names

    def layer_name(self, i: int, config: ModelConfig) -> str:
        """Return the architecture's name of layer i of a model."""
        return f"{self.layer_prefix}{i}"

    def _layer_names(self, config: BlockConfig, model: ModelConfig) -> dict[str, str]:
        with torch.device("meta"):
            block = Block(config, model.d_model, model.norm)
        own = dict(block.named_parameters())
        names = {name: theirs for name, theirs in self.block_names.items() if name in own}
        if config.mixer is not None and block.mixer is not None:
            prefix = self.mixers[config.mixer.type]
            leaves = block.mixer.hf_names()
            names |= {
                f"mixer.{name}": f"{prefix}.{self.leaf_names.get(leaf, leaf)}"
                for name, leaf in leaves.items()
            }
        return names

    def export_tensors(
        self, config: ModelConfig, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return own tensors under the architecture's names; no two of them share memory."""
        parts: dict[str, list[Tensor]] = {}
        for own, theirs in self.names(config).items():
            parts.setdefault(theirs, []).append(tensors[own])
        joined = {name: torch.cat(p) if len(p) > 1 else p[0] for name, p in parts.items()}
        if config.head.tie_embeddings and not self.can_tie:
            joined[self.model_names["head.weight"]] = tensors["embedding.weight"].clone()
        return joined

    def import_tensors(
        self, config: ModelConfig, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the architecture's tensors under own names; those it does not know keep theirs.

        So do those that cannot be split into what they are made of.
        """
        with torch.device("meta"):
            rows = {name: p.shape[0] for name, p in Backbone(config).named_parameters()}
        own_names: dict[str, list[str]] = {}
        for own, theirs in self.names(config).items():
            own_names.setdefault(theirs, []).append(own)
        found: dict[str, Tensor] = {}
        for name, tensor in self._current(config, tensors).items():
            parts = own_names.get(name, [name])
            sizes = [rows.get(part, 0) for part in parts]
            if len(parts) == 1:
                found[parts[0]] = tensor
            elif sum(sizes) == tensor.shape[0]:
                found |= zip(parts, tensor.split(sizes), strict=True)
            else:
                found[name] = tensor
        return found

    def _current(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of an older file under today's names, without those that mean nothing."""
        current = {}
        for name, tensor in tensors.items():
            for old, new in self.old_prefixes.items():
                if name.startswith(old):
                    name = new + name.removeprefix(old)
            if not name.endswith(self.unused):
                current[name] = tensor
        # Some files hold a tied matrix twice. Two that differ would be no tied ones.
        names = (self.model_names["head.weight"], self.model_names["embedding.weight"])
        if config.head.tie_embeddings and current.keys() >= set(names):
            head, embedding = (current[name] for name in names)
            if head.dtype == embedding.dtype and torch.equal(head, embedding):
                del current[names[0]]
        return current


def scale_obstacles(config: ModelConfig) -> list[str]:
    """Name the factors that an architecture without any cannot represent."""
    factors = {
        "embedding_scale": config.embedding_scale,
        "head.logit_scale": config.head.logit_scale,
    }
    factors |= {f"blocks.{n}.residual_scale": b.residual_scale for n, b in config.blocks.items()}
    return [
        f"{key}={value}: the architecture has no such factor"
        for key, value in factors.items()
        if value != 1
    ]


def residual_obstacles(block: BlockConfig) -> list[str]:
    """Name what is special about a block's residual stream, for a pre-norm architecture."""
    problems = []
    if block.learned_skip:
        problems.append(
            "learned_skip=true: the architecture adds to x as it is, without a weight a channel"
        )
    if block.norm_placement != "pre":
        problems.append(
            f"norm_placement={block.norm_placement}: the architecture has norms before mixers and "
            "FFNs only"
        )
    if block.layer_scale is not None:
        problems.append(
            f"layer_scale={block.layer_scale}: the architecture has no weight a channel there"
        )
    return problems


def stack_obstacles(config: ModelConfig) -> list[str]:
    """Name a stack that is not sequential, for an architecture that runs each layer once."""
    kind = config.stack.type
    return [] if kind == "sequential" else [f"stack={kind}: the architecture runs each layer once"]


def target_for_export(config: ModelConfig, model_type: str | None = None) -> Target:
    """Return the target of a `model_type`, or the first that can represent a model.

    Raises:
        UserError: it, or none at all, can; every obstacle of every target asked that has the
            model's mixers, and if there is one its stack, too, one line each.
    """
    if model_type:
        asked = [target_for_import(model_type, "export")]
    else:
        types = {mixer.type for mixer in config.mixers}
        every = list(_targets().values())
        with_mixers = [target for target in every if types <= target.mixers.keys()] or every
        asked = [t for t in with_mixers if config.stack.type in t.stacks] or with_mixers
    problems = []
    for target in asked:
        obstacles = target.obstacles(config)
        if not obstacles:
            return target
        problems += [f"export to {target.model_type}: {line}" for line in obstacles]
    raise UserError(*problems)


def target_for_import(model_type: object, where: str) -> Target:
    """Return the target of a `model_type`; `where` names its origin in the UserError."""
    targets = _targets()
    target = targets.get(str(model_type))
    if target is None:
        known = ", ".join(sorted(targets))
        raise UserError(f"{where}: model_type={model_type}: expected one of {known}")
    return target


def _targets() -> dict[str, Target]:
    importlib.import_module("megarec.conversion.targets")
    ordered = sorted(Target.members.items(), key=lambda item: (item[1].rank, item[0]))
    return {name: member() for name, member in ordered}
