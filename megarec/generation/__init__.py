"""Decoding with the recurrent state."""

from megarec.generation.decode import Sampling, generate

__all__ = ["Sampling", "generate"]
