"""Multi-scale retention, the mixer of RetNet (arXiv 2307.08621): the example of CONTRIBUTING.md."""

from typing import Any, Literal

import torch
from megarec_kernels.gated_linear_attention import (
    gated_linear_attention,
    gated_linear_attention_step,
    initial_state,
)
from torch import Tensor, nn
from torch.nn import functional as F

from megarec.config.activations import Activations, Numbers, linear_attention
from megarec.config.base import PositiveFloat, PositiveInt
from megarec.config.mixer import MixerConfig
from megarec.models.context import Context
from megarec.models.init import Initializer
from megarec.models.mixer import Mixer
from megarec.models.norm import HeadLayerNorm
from megarec.models.state import State


class RetentionConfig(MixerConfig):
    """Config of retention; values are `v_dim_factor` times as wide as queries and keys."""

    type: Literal["retention"] = "retention"
    num_heads: PositiveInt
    v_dim_factor: PositiveInt = 2
    norm_eps: PositiveFloat = 1e-6
    chunk_size: PositiveInt = 64

    def problems(self, d_model: int) -> list[str]:
        """Heads must divide the width."""
        if d_model % self.num_heads == 0:
            return []
        return [f"num_heads={self.num_heads} does not divide d_model={d_model}"]

    def tp_sizes(self) -> dict[str, int]:
        """Heads."""
        return {"num_heads": self.num_heads}

    def num_params(self, d_model: int) -> int:
        """Count q, k; v, gate, out projection; the norm; the decays."""
        v = self.v_dim_factor * d_model
        return 2 * d_model * d_model + 3 * d_model * v + v + self.num_heads

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        """Count matmuls: projections, and the chunkwise cell with a causal half inside a chunk."""
        v = self.v_dim_factor * d_model
        linear = 2.0 * d_model * (2 * d_model + 3 * v)
        inside = min(self.chunk_size, seq_len) * (d_model + v)
        across = 4.0 * (d_model // self.num_heads) * v
        return linear + inside + across

    def state_bytes(self, d_model: int, seq_len: int) -> int:
        """A matrix of keys x values a head, whatever the length."""
        return 4 * (d_model // self.num_heads) * self.v_dim_factor * d_model

    def activations(self, d_model: int, seq_len: int) -> Activations:
        """Count x, the cell, the statistics of its norm, the gate and what it multiplies."""
        v, heads = self.v_dim_factor * d_model, self.num_heads
        around = Activations(
            kept=Numbers(narrow=d_model + 4 * v, wide=4 * heads),
            saved=Numbers(narrow=2 * d_model + 2 * v + d_model),
        )
        return around + linear_attention(
            heads, d_model // heads, v // heads, self.chunk_size, seq_len
        )

    def build(self, d_model: int) -> "Retention":
        """Build the module."""
        return Retention(self, d_model)


class Decay(nn.Module):
    """A forget gate for each head that does not depend on the input, in float32.

    RetNet's decays are constants; here they are parameters that start there, so that tensor
    parallelism splits them along with the heads.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.empty(num_heads))

    def forward(self, k_BTHK: Tensor) -> Tensor:
        """Return log f (..., H), the same for every token of k (..., H, K)."""
        return F.logsigmoid(self.logit).expand(k_BTHK.shape[:-1])


class Retention(Mixer):
    """y = out_proj(silu(gate) * norm(h)); h is linear attention that decays by a factor a head.

    Section 2.1 without the rotation of queries and keys. Suffixes: B batch, T time, D d_model,
    H heads, K and V the head dims of keys and values.
    """

    float32_modules = ("decay",)

    def __init__(self, config: RetentionConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.qk_head_dim = d_model // config.num_heads
        self.v_head_dim = config.v_dim_factor * self.qk_head_dim
        v_dim = config.v_dim_factor * d_model
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.k = nn.Linear(d_model, d_model, bias=False)
        self.v = nn.Linear(d_model, v_dim, bias=False)
        self.gate = nn.Linear(d_model, v_dim, bias=False)
        self.decay = Decay(config.num_heads)
        self.norm = HeadLayerNorm(config.num_heads, self.v_head_dim, config.norm_eps)
        self.out_proj = nn.Linear(v_dim, d_model, bias=False)

    def project(self, x: Tensor) -> dict[str, Any]:
        """Map x (..., D) to the cell's inputs: q, k (..., H, K), v (..., H, V), log_f (..., H)."""
        k = self.k(x).unflatten(-1, (-1, self.qk_head_dim))
        return {
            "q": self.q(x).unflatten(-1, (-1, self.qk_head_dim)),
            "k": k,
            "v": self.v(x).unflatten(-1, (-1, self.v_head_dim)),
            "log_f": self.decay(k),
        }

    def output(self, h: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and projection: h (..., H, V), x (..., D) -> (..., D)."""
        return self.out_proj(F.silu(self.gate(x)) * self.norm(h))

    def forward(
        self, x_BTD: Tensor, ctx: Context, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Mix a sequence; see Mixer."""
        h_BTHV, state, _ = gated_linear_attention(
            **self.project(x_BTD),
            resets=ctx.resets,
            state=state,
            gate="plain",
            chunk_size=self.config.chunk_size,
        )
        return self.output(h_BTHV, x_BTD), state

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix one token; see Mixer."""
        h_BHV, state = gated_linear_attention_step(**self.project(x_BD), state=state, gate="plain")
        return self.output(h_BHV, x_BD), state

    def init_state(self, batch_size: int, device: torch.device) -> State:
        """Return C (B, H, K, V), zero, in the decays' dtype."""
        return initial_state(
            batch_size,
            self.config.num_heads,
            self.qk_head_dim,
            self.v_head_dim,
            gate="plain",
            normalize=False,
            dtype=torch.promote_types(self.decay.logit.dtype, torch.float32),
            device=device,
        )

    def init_weights(self, init: Initializer) -> None:
        """Draw the matrices; head h starts with a decay of 1 - 2^(-5 - h) (section 2.2)."""
        for linear in (self.q, self.k, self.v, self.gate):
            init.normal(linear.weight, init.std)
        init.normal(self.out_proj.weight, init.out_std)
        head = torch.arange(self.config.num_heads)
        init.values(self.decay.logit, torch.log(2.0 ** (5 + head) - 1))
        self.norm.init_weights(init)

    def tp_plan(self) -> dict[str, str]:
        """Split by heads: projections by column, the out projection by row."""
        return {
            "[qkv].weight": "column",
            "gate.weight": "column",
            "decay.*": "head",
            "norm.weight": "head",
            "out_proj.weight": "row",
        }

    def hf_names(self) -> dict[str, str]:
        """Keep the names: no architecture of transformers has this mixer."""
        return {name: name for name, _ in self.named_parameters()}
