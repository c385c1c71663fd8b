"""The target contract: what megarec must know of one Hugging Face architecture."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from megarec.config.model import ModelConfig
from megarec.errors import UserError


class Target(ABC):
    """One `model_type` of transformers. A subclass registers itself under it.

    Every module in ``megarec/conversion/targets`` is found by itself, so a new target is one file.
    Configs are plain JSON values; tensors are keyed by parameter names. Own parameter names and
    `model_type`'s differ; only the target knows both.
    """

    model_type: ClassVar[str]
    members: ClassVar[dict[str, type["Target"]]] = {}

    def __init_subclass__(cls) -> None:
        Target.members[cls.model_type] = cls

    @abstractmethod
    def obstacles(self, config: ModelConfig) -> list[str]:
        """Say what of a model the architecture cannot represent, one line each; [] if nothing."""

    @abstractmethod
    def notes(self, config: ModelConfig) -> list[str]:
        """Say what users of the export must know, a sentence each; it stands on the model card."""

    @abstractmethod
    def export_config(self, config: ModelConfig) -> dict[str, Any]:
        """Return config.json, without token ids and dtype, of a model without obstacles."""

    @abstractmethod
    def export_tensors(
        self, config: ModelConfig, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return own tensors under the architecture's names; no two of them share memory."""

    @abstractmethod
    def import_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Return the model section for a config.json of this or an older layout.

        Raises:
            ValidationError: pydantic's, with every key that megarec cannot represent.
        """

    @abstractmethod
    def import_tensors(
        self, config: ModelConfig, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return tensors of this or an older layout under own names; unknown ones keep theirs."""


def target_for_export(config: ModelConfig) -> Target:
    """Return the first target that can represent a model.

    Raises:
        UserError: none can; every obstacle of every target, one line each.
    """
    problems = []
    for target in _targets().values():
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
        known = ", ".join(targets)
        raise UserError(f"{where}: model_type={model_type}: expected one of {known}")
    return target


def _targets() -> dict[str, Target]:
    importlib.import_module("megarec.conversion.targets")
    return {name: member() for name, member in sorted(Target.members.items())}
