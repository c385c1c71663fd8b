"""mLSTM, the mixer of xLSTM 7B (arXiv 2503.13427; cell: arXiv 2405.04517, section 2.3)."""

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
from megarec.config.base import Pair, PositiveFloat, PositiveInt
from megarec.config.mixer import MixerConfig
from megarec.models.context import Context
from megarec.models.init import Initializer
from megarec.models.mixer import Mixer
from megarec.models.norm import HeadLayerNorm
from megarec.models.state import State

SOFT_RESET = -25.0
"""Forget pre-activation at a document's first token under `document_reset: soft`."""


class MLSTMConfig(MixerConfig):
    """Config of the mLSTM mixer.

    `igate_bias_init` far below zero keeps the branch almost shut at first (xLSTM 7B: -10);
    `fgate_bias_init` is spread linearly over the heads. `document_reset: soft` is the paper's
    reset, a forget gate of sigmoid(-25); `exact` forgets everything.
    """

    type: Literal["mlstm"] = "mlstm"
    num_heads: PositiveInt
    qk_dim_factor: PositiveFloat = 0.5
    v_dim_factor: PositiveFloat = 1.0
    gate_soft_cap: PositiveFloat = 15.0
    norm_eps: PositiveFloat = 1e-6
    igate_bias_init: float = -10.0
    fgate_bias_init: Pair = (3.0, 6.0)
    chunk_size: PositiveInt = 64
    document_reset: Literal["exact", "soft"] = "exact"

    def qk_dim(self, d_model: int) -> int:
        """Return the width of all heads' queries together."""
        return int(d_model * self.qk_dim_factor)

    def v_dim(self, d_model: int) -> int:
        """Return the width of all heads' values together."""
        return int(d_model * self.v_dim_factor)

    def problems(self, d_model: int) -> list[str]:
        """Heads must divide both widths."""
        widths = {"qk_dim_factor": self.qk_dim(d_model), "v_dim_factor": self.v_dim(d_model)}
        return [
            f"{key}: d_model={d_model} gives a width of {width}, which num_heads={self.num_heads} "
            "does not divide"
            for key, width in widths.items()
            if width == 0 or width % self.num_heads
        ]

    def tp_sizes(self) -> dict[str, int]:
        """Heads."""
        return {"num_heads": self.num_heads}

    def num_params(self, d_model: int) -> int:
        """Count q, k; v, output gate, out projection; the two gates; the norm."""
        qk, v = self.qk_dim(d_model), self.v_dim(d_model)
        return 2 * d_model * qk + 3 * d_model * v + 2 * (d_model + 1) * self.num_heads + v

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        """Count matmuls: projections, and the chunkwise cell with a causal half inside a chunk."""
        qk, v, heads = self.qk_dim(d_model), self.v_dim(d_model), self.num_heads
        chunk = min(self.chunk_size, seq_len)
        linear = 2.0 * d_model * (2 * qk + 3 * v + 2 * heads)
        inside = chunk * (qk + v)
        across = 4.0 * (qk // heads) * (v + heads)
        return linear + inside + across

    def state_bytes(self, d_model: int, seq_len: int) -> int:
        """C (Dk x Dv), n (Dk) and m (1) a head, in float32, whatever the length."""
        dk, dv = self.qk_dim(d_model) // self.num_heads, self.v_dim(d_model) // self.num_heads
        return 4 * self.num_heads * (dk * dv + dk + 1)

    def activations(self, d_model: int, seq_len: int) -> Activations:
        """Count x twice (the gates read it in float32), the cell, its norm and the output gate."""
        qk, v, heads = self.qk_dim(d_model), self.v_dim(d_model), self.num_heads
        around = Activations(
            kept=Numbers(narrow=d_model + 2 * v, wide=7 * heads, copies=d_model),
            saved=Numbers(narrow=2 * qk + 2 * v + d_model, wide=2 * heads),
        )
        return around + linear_attention(
            heads, qk // heads, v // heads, self.chunk_size, seq_len, normalize=True
        )

    def build(self, d_model: int) -> "MLSTM":
        """Build the module."""
        return MLSTM(self, d_model)


class Gates(nn.Module):
    """Input- and forget-gate pre-activations, computed in float32 with float32 parameters."""

    def __init__(self, d_model: int, num_heads: int, soft_cap: float) -> None:
        super().__init__()
        self.soft_cap = soft_cap
        self.igate = nn.Linear(d_model, num_heads)
        self.fgate = nn.Linear(d_model, num_heads)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (..., d_model) to soft-capped (i, f), each (..., H), float32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        cap = self.soft_cap
        igate, fgate = self.igate(x), self.fgate(x)
        return cap * torch.tanh(igate / cap), cap * torch.tanh(fgate / cap)


class MLSTM(Mixer):
    """y = out_proj(sigmoid(o) * norm(h)); h from the matrix-memory cell with exponential gates.

    Shapes: B batch, T time, D d_model, H heads, K and V the head dims of keys and values.
    """

    float32_modules = ("gates",)

    def __init__(self, config: MLSTMConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_heads
        self.qk_head_dim = config.qk_dim(d_model) // config.num_heads
        self.v_head_dim = config.v_dim(d_model) // config.num_heads
        qk_dim, v_dim = config.qk_dim(d_model), config.v_dim(d_model)
        self.q = nn.Linear(d_model, qk_dim, bias=False)
        self.k = nn.Linear(d_model, qk_dim, bias=False)
        self.v = nn.Linear(d_model, v_dim, bias=False)
        self.ogate = nn.Linear(d_model, v_dim, bias=False)
        self.gates = Gates(d_model, config.num_heads, config.gate_soft_cap)
        self.norm = HeadLayerNorm(config.num_heads, self.v_head_dim, config.norm_eps)
        self.out_proj = nn.Linear(v_dim, d_model, bias=False)

    def project(self, x: Tensor) -> dict[str, Any]:
        """Map x (..., D) to the cell's inputs: q, k (..., H, K), v (..., H, V), gates (..., H)."""
        igate, fgate = self.gates(x)
        return {
            "q": self.q(x).unflatten(-1, (-1, self.qk_head_dim)),
            "k": self.k(x).unflatten(-1, (-1, self.qk_head_dim)),
            "v": self.v(x).unflatten(-1, (-1, self.v_head_dim)),
            "log_f": F.logsigmoid(fgate),
            "log_i": igate,
        }

    def output(self, h: Tensor, x: Tensor) -> Tensor:
        """Norm, output gate and projection: h (..., H, V), x (..., D) -> (..., D)."""
        return self.out_proj(self.norm(h, self.ogate(x)))

    def forward(
        self, x_BTD: Tensor, ctx: Context, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Mix a sequence; see Mixer."""
        cell = self.project(x_BTD)
        resets = ctx.resets
        if resets is not None and self.config.document_reset == "soft" and not ctx.exact:
            soft = F.logsigmoid(torch.full_like(cell["log_f"], SOFT_RESET))
            cell["log_f"] = torch.where(resets[..., None], soft, cell["log_f"])
            resets = None
        h_BTHV, state, _ = gated_linear_attention(
            **cell,
            resets=resets,
            state=state,
            gate="exp",
            normalize=True,
            chunk_size=self.config.chunk_size,
        )
        return self.output(h_BTHV, x_BTD), state

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix one token; see Mixer."""
        h_BHV, state = gated_linear_attention_step(
            **self.project(x_BD), state=state, gate="exp", normalize=True
        )
        return self.output(h_BHV, x_BD), state

    def init_state(self, batch_size: int, device: torch.device) -> State:
        """Return C (B, H, K, V), n (B, H, K) and m (B, H), all zero, in the gates' dtype."""
        return initial_state(
            batch_size,
            self.num_heads,
            self.qk_head_dim,
            self.v_head_dim,
            gate="exp",
            normalize=True,
            dtype=torch.promote_types(self.gates.igate.weight.dtype, torch.float32),
            device=device,
        )

    def init_weights(self, init: Initializer) -> None:
        """Initialise as the 7B run did: gate weights zero, gate biases spread over the heads."""
        for linear in (self.q, self.k, self.v):
            init.normal(linear.weight, init.std)
        init.normal(self.out_proj.weight, init.out_std)
        for linear in (self.ogate, self.gates.igate, self.gates.fgate):
            init.constant(linear.weight, 0.0)
        init.constant(self.gates.igate.bias, self.config.igate_bias_init)
        low, high = self.config.fgate_bias_init
        init.values(self.gates.fgate.bias, torch.linspace(low, high, self.num_heads))
        self.norm.init_weights(init)

    def tp_plan(self) -> dict[str, str]:
        """Split by heads: projections by column, the out projection by row."""
        return {
            "q.weight": "column",
            "k.weight": "column",
            "v.weight": "column",
            "ogate.weight": "column",
            "gates.*": "head",
            "norm.weight": "head",
            "out_proj.weight": "row",
        }

    def hf_names(self) -> dict[str, str]:
        """Name the parameters as transformers' xLSTM layer does."""
        return {
            "q.weight": "q.weight",
            "k.weight": "k.weight",
            "v.weight": "v.weight",
            "ogate.weight": "ogate_preact.weight",
            "gates.igate.weight": "igate_preact.weight",
            "gates.igate.bias": "igate_preact.bias",
            "gates.fgate.weight": "fgate_preact.weight",
            "gates.fgate.bias": "fgate_preact.bias",
            "norm.weight": "multihead_norm.weight",
            "out_proj.weight": "out_proj.weight",
        }
