"""Recurrent and loss kernels for pretraining; needs torch and nothing else."""

from megarec_kernels.gated_linear_attention import (
    gated_linear_attention,
    gated_linear_attention_step,
    initial_state,
)
from megarec_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "gated_linear_attention",
    "gated_linear_attention_step",
    "initial_state",
    "linear_cross_entropy",
]
