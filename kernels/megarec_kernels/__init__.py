"""Recurrent, attention and loss kernels for pretraining; needs torch and nothing else."""

from megarec_kernels.attention import attention
from megarec_kernels.causal_conv1d import causal_conv1d
from megarec_kernels.gated_linear_attention import (
    gated_linear_attention,
    gated_linear_attention_step,
    initial_state,
)
from megarec_kernels.grouped_norm import grouped_norm
from megarec_kernels.linear_cross_entropy import linear_cross_entropy
from megarec_kernels.linear_distillation import linear_distillation
from megarec_kernels.rotary import rotary
from megarec_kernels.swiglu import swiglu

__all__ = [
    "attention",
    "causal_conv1d",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "grouped_norm",
    "initial_state",
    "linear_cross_entropy",
    "linear_distillation",
    "rotary",
    "swiglu",
]
