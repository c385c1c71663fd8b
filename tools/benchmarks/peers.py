"""Forms of other packages, imported where they are used: what is not installed says so.

Each takes and returns what ours does, by name; a peer that computes something else fails the check
and is not timed. Interfaces are those of mlstm_kernels 2.0, fla-core 0.6, mamba-ssm 2.3,
liger-kernel 0.8, flash-attn 2.8 and causal-conv1d 1.7.
"""

import torch
from megarec_kernels.check import Tensors
from torch import Tensor


def mlstm_xl_chunk(
    chunk_size: int, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor
) -> Tensors:
    """The mLSTM with exponential input gate (arXiv 2503.14376); heads first."""
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk

    y = mlstm_chunkwise__xl_chunk(
        q=q, k=k, v=v, i=i, f=f, return_last_states=False, chunk_size=chunk_size
    )
    return {"y": y}


def mlstm_siging_xl_chunk(
    chunk_size: int, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor
) -> Tensors:
    """The mLSTM with sigmoid input gate, without normaliser (arXiv 2503.14376); heads first."""
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging import (
        mlstm_siging_chunkwise__xl_chunk,
    )

    y = mlstm_siging_chunkwise__xl_chunk(
        q=q,
        k=k,
        v=v,
        i=i,
        f=f,
        return_last_states=False,
        chunk_size=chunk_size,
        normalize=False,
    )
    return {"y": y}


def fla_simple_gla(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> Tensors:
    """Linear attention with a scalar decay a head."""
    from fla.ops.simple_gla import chunk_simple_gla

    return {"y": chunk_simple_gla(q, k, v, g=log_f)[0]}


def mamba_ssd(chunk_size: int, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensors:
    """Mamba-2's scan (arXiv 2405.21060)."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return {"y": mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size)}


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    """Causal softmax attention of flash-attn."""
    from flash_attn import flash_attn_func

    return {"y": flash_attn_func(q, k, v, causal=True)}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    """Causal softmax attention of torch; heads first."""
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return {"y": y}


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
    """The short convolution with SiLU of causal-conv1d."""
    from causal_conv1d import causal_conv1d_fn

    return {"y": causal_conv1d_fn(x.mT, weight, bias, activation="silu").mT}


def fla_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
    """The short convolution with SiLU of fla."""
    from fla.modules.causal_conv1d import causal_conv1d as convolution

    return {"y": convolution(x, weight, bias, activation="silu")[0]}


def liger_rms_norm(eps: float, x: Tensor, weight: Tensor) -> Tensors:
    """RMSNorm of Liger, cast as Llama's: the weight multiplies what is rounded already."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return {"y": LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)}


def fla_rms_norm(eps: float, x: Tensor, weight: Tensor) -> Tensors:
    """RMSNorm of fla."""
    from fla.modules.norm.layernorm import rms_norm

    return {"y": rms_norm(x, weight, None, eps=eps)}


def liger_swiglu(gate: Tensor, up: Tensor) -> Tensors:
    """silu(gate) * up of Liger."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return {"y": LigerSiLUMulFunction.apply(gate, up)}


def fla_swiglu(gate: Tensor, up: Tensor) -> Tensors:
    """silu(gate) * up of fla."""
    from fla.modules.activations import swiglu

    return {"y": swiglu(gate, up)}


def liger_loss(soft_cap: float, x: Tensor, weight: Tensor, labels: Tensor) -> Tensors:
    """Linear, soft cap and cross-entropy of Liger, summed."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(x, weight, labels, reduction="sum", softcap=soft_cap)
    return {"loss": loss}
