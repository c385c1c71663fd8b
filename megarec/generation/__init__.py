"""Decoding with the recurrent state."""

from megarec.generation.decode import Sampling, generate
from megarec.generation.diffusion_forcing import (
    Continuation,
    DiffusionForcingConfig,
    diffusion_forcing,
)

__all__ = ["Continuation", "DiffusionForcingConfig", "Sampling", "diffusion_forcing", "generate"]
