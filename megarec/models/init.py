"""Initial weights: a pure function of (seed, parameter name), the same on any mesh."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megarec.config.model import ModelConfig

Assign = Callable[[Tensor, Tensor], None]
Then = Callable[[Tensor], Tensor]


def seed_from(*parts: object) -> int:
    """Hash any printable parts to a seed in [0, 2^63)."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def assign_whole(parameter: Tensor, whole: Tensor) -> None:
    """Write a whole tensor into a parameter that is not sharded."""
    parameter.copy_(whole)


def _as_drawn(drawn: Tensor) -> Tensor:
    return drawn


class Initializer:
    """Writes initial values; mixers call it from `init_weights`.

    Every random tensor is drawn whole, on the CPU, in float32, from a generator seeded by
    (seed, name); `assign` then puts it, or the shard of this rank, into the parameter.

    Attributes:
        std: standard deviation of ordinary weight matrices.
        out_std: standard deviation of the matrices that write to the residual stream.
    """

    def __init__(
        self, config: ModelConfig, names: dict[Tensor, str], seed: int, assign: Assign
    ) -> None:
        init, width, depth = config.init, config.d_model, len(config.runs)
        self.std = (2 / (5 * width)) ** 0.5 if init.std == "small" else init.std
        named = {"wang": 2 / depth / width**0.5, "depth": self.std / (2 * depth) ** 0.5}
        self.out_std = named[init.out_std] if isinstance(init.out_std, str) else init.out_std
        self._cut = init.cut
        self._names = names
        self._seed = seed
        self._assign = assign

    def normal(self, parameter: Tensor, std: float, then: Then = _as_drawn) -> None:
        """Draw from N(0, std^2), cut where the config says so, then apply a function."""
        whole, generator = torch.empty(parameter.shape), self._generator(parameter)
        if self._cut is None:
            whole.normal_(0.0, std, generator=generator)
        else:
            bound = self._cut * std
            nn.init.trunc_normal_(whole, 0.0, std, -bound, bound, generator=generator)
        self.values(parameter, then(whole))

    def uniform(self, parameter: Tensor, low: float, high: float, then: Then = _as_drawn) -> None:
        """Draw from U(low, high), then apply a function."""
        whole = torch.empty(parameter.shape)
        whole.uniform_(low, high, generator=self._generator(parameter))
        self.values(parameter, then(whole))

    def constant(self, parameter: Tensor, value: float) -> None:
        """Set every element to one value."""
        self.values(parameter, torch.full(parameter.shape, value))

    def _generator(self, parameter: Tensor) -> torch.Generator:
        seed = seed_from(self._seed, self._names[parameter])
        return torch.Generator("cpu").manual_seed(seed)

    def values(self, parameter: Tensor, whole: Tensor) -> None:
        """Set a parameter from its whole (unsharded) tensor of the same shape."""
        self._assign(parameter, whole)
