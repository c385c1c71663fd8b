"""The mixer registry: what a mixer's config must answer without building anything."""

import importlib
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from megarec.config.activations import Activations
from megarec.config.base import Registered

if TYPE_CHECKING:
    from megarec.models.mixer import Mixer


class MixerConfig(Registered):
    """Config of one mixer. A subclass with a `type` default registers itself.

    Every module in ``megarec/models/mixers`` is found by itself, so a new mixer is one file.
    """

    kind: ClassVar[str] = "mixer"

    @classmethod
    def discover(cls) -> None:
        """Import every mixer that ships with megarec."""
        importlib.import_module("megarec.models.mixers")

    def problems(self, d_model: int) -> list[str]:
        """Say what does not fit this width, one line each; empty when all is well."""
        return []

    def longest_document(self) -> int | None:
        """Return the number of tokens of the longest document that fits; None for any length."""
        return None

    def tp_sizes(self) -> dict[str, int] | None:
        """Return the numbers of heads, groups or channels that tensor parallelism divides, by key.

        Its ranks must divide each. None, the default: the mixer cannot be divided.
        """
        return None

    @abstractmethod
    def num_params(self, d_model: int) -> int:
        """Return the number of parameters of one mixer."""

    @abstractmethod
    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        """Return the FLOPs of the forward pass, per token of a sequence of this length."""

    @abstractmethod
    def state_bytes(self, d_model: int, seq_len: int) -> int:
        """Return the bytes of one sequence's decoding state after seq_len tokens, in float32."""

    @abstractmethod
    def activations(self, d_model: int, seq_len: int) -> Activations:
        """Return what the backward pass needs, a token of a sequence of this length."""

    @abstractmethod
    def build(self, d_model: int) -> "Mixer":
        """Build the module, on torch's current default device."""
