"""How often a looped stack iterates in training: distributions over the number of recurrences."""

import math
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from megarec.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Registered

MODULUS = 2**31 - 1


class DepthConfig(Registered):
    """A distribution of the number of recurrences: a pure function of (seed, step).

    One number holds for all ranks. `per: micro_batch` draws anew for each micro-batch of a step,
    the step being counted in micro-batches. `seed` replaces the run's.
    """

    kind: ClassVar[str] = "depth distribution"

    per: Literal["step", "micro_batch"] = "step"
    seed: NonNegativeInt | None = None

    def draw(self, seed: int, step: int, backprop: int | None) -> int:
        """Return the number of recurrences, at least 1.

        Args:
            seed: of the run.
            step: 0 for the first; of the optimizer, or a micro-batch's (see `per`).
            backprop: how many of them, the last ones, are differentiated; None for all.
        """
        first = seed if self.seed is None else self.seed
        return self.sample(torch.Generator().manual_seed((first + step + 1) % MODULUS), backprop)

    @abstractmethod
    def sample(self, generator: torch.Generator, backprop: int | None) -> int:
        """Draw a number of recurrences, at least 1."""

    @abstractmethod
    def mean_recurrences(self) -> float:
        """Return the mean, for estimates of cost."""


class LognormalPoissonDepth(DepthConfig):
    """1 + Poisson(rate), rate log-normal with this mean (Huginn, arXiv 2502.05171, section 3.3).

    The mean number is mean + 1. As in Huginn's code the rate's mean is at least `backprop`, where
    that is larger.
    """

    type: Literal["lognormal_poisson"] = "lognormal_poisson"
    mean: PositiveInt
    sigma: PositiveFloat = 0.5

    def sample(self, generator: torch.Generator, backprop: int | None) -> int:
        """Draw the rate, then the number, from one generator."""
        mu = math.log(max(self.mean, backprop or 0)) - self.sigma**2 / 2
        rate = torch.zeros(1).log_normal_(mu, self.sigma, generator=generator)
        return int(torch.poisson(rate, generator=generator)) + 1

    def mean_recurrences(self) -> float:
        """Return mean + 1."""
        return self.mean + 1.0


class PoissonDepth(DepthConfig):
    """1 + Poisson(mean - 1)."""

    type: Literal["poisson"] = "poisson"
    mean: Annotated[float, Field(ge=1, allow_inf_nan=False)]

    def sample(self, generator: torch.Generator, backprop: int | None) -> int:
        """Draw it."""
        return int(torch.poisson(torch.tensor([self.mean - 1.0]), generator=generator)) + 1

    def mean_recurrences(self) -> float:
        """Return the mean."""
        return self.mean


class UniformDepth(DepthConfig):
    """Every whole number from `low` to `high`, both included, with equal probability."""

    type: Literal["uniform"] = "uniform"
    low: PositiveInt
    high: PositiveInt

    @model_validator(mode="after")
    def _in_order(self) -> "UniformDepth":
        if self.low > self.high:
            raise ValueError(f"low={self.low} exceeds high={self.high}; swap them")
        return self

    def sample(self, generator: torch.Generator, backprop: int | None) -> int:
        """Draw it."""
        return int(torch.randint(self.low, self.high + 1, (1,), generator=generator))

    def mean_recurrences(self) -> float:
        """Return the middle."""
        return (self.low + self.high) / 2


class FixedDepth(DepthConfig):
    """Always the same number."""

    type: Literal["fixed"] = "fixed"
    num_recurrences: PositiveInt

    def sample(self, generator: torch.Generator, backprop: int | None) -> int:
        """Return the number."""
        return self.num_recurrences

    def mean_recurrences(self) -> float:
        """Return the number."""
        return float(self.num_recurrences)
