"""Mamba-2, the state-space mixer of Nemotron-H and many hybrids (arXiv 2405.21060)."""

import math
from typing import Annotated, Any, Literal, cast

import torch
from megarec_kernels.gated_linear_attention import (
    gated_linear_attention,
    gated_linear_attention_step,
    initial_state,
)
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from megarec.config.activations import (
    Activations,
    Numbers,
    causal_conv,
    gated_group_norm,
    linear_attention,
)
from megarec.config.base import NonNegativeFloat, Pair, PositiveFloat, PositiveInt, Tuple
from megarec.config.mixer import MixerConfig
from megarec.models.context import Context
from megarec.models.conv import CausalConv
from megarec.models.init import Initializer
from megarec.models.mixer import Mixer
from megarec.models.norm import GatedGroupRMSNorm
from megarec.models.state import State

A_RANGE = (1.0, 16.0)
"""Initial decay rates -A are drawn uniformly from here (mamba_ssm's default)."""


class Mamba2Config(MixerConfig):
    """Config of the Mamba-2 mixer.

    The inner width is num_heads * head_dim; B and C (keys and queries) have num_groups heads of
    state_dim channels. Step sizes softplus(dt + bias) are clamped to `dt_limit`; at first they are
    log-uniform in `dt_init`, but not below `dt_init_floor`.
    """

    type: Literal["mamba2"] = "mamba2"
    num_heads: PositiveInt
    head_dim: PositiveInt = 64
    state_dim: PositiveInt = 128
    num_groups: PositiveInt = 1
    conv_kernel: PositiveInt = 4
    conv_bias: bool = True
    norm_eps: PositiveFloat = 1e-5
    dt_limit: Annotated[tuple[NonNegativeFloat, Annotated[float, Field(gt=0)]], Tuple] = (
        0.0,
        math.inf,
    )
    dt_init: Pair = (1e-3, 1e-1)
    dt_init_floor: PositiveFloat = 1e-4
    chunk_size: PositiveInt = 64

    def inner(self) -> int:
        """Return the width of all heads together."""
        return self.num_heads * self.head_dim

    def stream_widths(self) -> dict[str, int]:
        """Return the widths of what passes the convolution, in the order of fused layouts."""
        bc = self.num_groups * self.state_dim
        return {"x": self.inner(), "B": bc, "C": bc}

    def problems(self, d_model: int) -> list[str]:
        """Groups must divide heads, and ranges be ranges."""
        problems = []
        if self.num_heads % self.num_groups:
            problems.append(
                f"num_groups={self.num_groups} does not divide num_heads={self.num_heads}"
            )
        for key in ("dt_limit", "dt_init"):
            low, high = getattr(self, key)
            if low > high or (key == "dt_init" and low <= 0):
                problems.append(f"{key}={[low, high]}: expected a range, the lower bound first")
        return problems

    def tp_sizes(self) -> dict[str, int]:
        """Heads, and the groups that share B, C and the norm's statistics."""
        return {"num_heads": self.num_heads, "num_groups": self.num_groups}

    def num_params(self, d_model: int) -> int:
        """Count z, x, B, C, dt; the convolution; A, D and dt's bias; norm and out projection."""
        conv = sum(self.stream_widths().values())
        projections = d_model * (2 * self.inner() + conv + self.num_heads)
        return (
            projections
            + conv * (self.conv_kernel + self.conv_bias)
            + 3 * self.num_heads
            + (self.inner())
        )

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        """Count matmuls: projections, and the chunkwise cell with a causal half inside a chunk."""
        conv, inner = sum(self.stream_widths().values()), self.inner()
        chunk = min(self.chunk_size, seq_len)
        linear = 2.0 * d_model * (2 * inner + conv + self.num_heads)
        inside = chunk * (self.num_groups * self.state_dim + inner)
        across = 4.0 * inner * self.state_dim
        return linear + inside + across

    def state_bytes(self, d_model: int, seq_len: int) -> int:
        """The memory (state_dim x head_dim a head) and the convolution's last inputs."""
        conv = sum(self.stream_widths().values())
        return 4 * (self.inner() * self.state_dim + (self.conv_kernel - 1) * conv)

    def activations(self, d_model: int, seq_len: int) -> Activations:
        """Count x, the convolution, step sizes, the cell, the skip of float32 v, the norm."""
        conv, inner, heads = sum(self.stream_widths().values()), self.inner(), self.num_heads
        around = Activations(
            kept=Numbers(narrow=d_model + inner, wide=inner + 5 * heads, copies=inner)
            + causal_conv(conv)
            + gated_group_norm(inner, self.num_groups),
            saved=Numbers(narrow=conv + inner + heads + d_model),
        )
        return around + linear_attention(
            heads,
            self.state_dim,
            self.head_dim,
            self.chunk_size,
            seq_len,
            num_groups=self.num_groups,
        )

    def build(self, d_model: int) -> "Mamba2":
        """Build the module."""
        return Mamba2(self, d_model)


class Dynamics(nn.Module):
    """Step sizes, decay and skip: the parameters that stay in float32, and what uses them."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.A_log = nn.Parameter(torch.empty(config.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads))
        self.D = nn.Parameter(torch.empty(config.num_heads))

    def forward(self, dt: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map dt (..., H) and x (..., H, P) to log f = dt A, log i = log dt and the skip D x.

        All are float32 at least.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(dtype) + self.dt_bias).clamp(*self.config.dt_limit)
        # softplus underflows far below 0; a step that small adds nothing, but its log must exist.
        log_dt = dt.clamp_min(torch.finfo(dtype).tiny).log()
        return -dt * self.A_log.exp(), log_dt, self.D[:, None] * x.to(dtype)

    def init_weights(self, init: Initializer) -> None:
        """Draw step sizes log-uniformly and decay rates uniformly; the skip is 1."""
        low, high = self.config.dt_init

        def inverse_softplus(log_dt: Tensor) -> Tensor:
            dt = log_dt.exp().clamp_min(self.config.dt_init_floor)
            return dt + torch.log(-torch.expm1(-dt))

        init.uniform(self.dt_bias, math.log(low), math.log(high), inverse_softplus)
        init.uniform(self.A_log, *A_RANGE, torch.log)
        init.constant(self.D, 1.0)


class Mamba2(Mixer):
    """y = out_proj(norm((SSD(x, B, C, dt) + D x) * silu(z))).

    SSD is gated linear attention with queries C, keys B, values x, f = exp(dt A) and i = dt
    (arXiv 2405.21060, eq. 1 and section 7). Shapes: B batch, T time, D d_model, H heads, P head
    dim, G groups, N state dim.
    """

    float32_modules = ("dynamics",)

    def __init__(self, config: Mamba2Config, d_model: int) -> None:
        super().__init__()
        self.config = config
        widths = config.stream_widths()
        self.z = nn.Linear(d_model, config.inner(), bias=False)
        self.x = nn.Linear(d_model, widths["x"], bias=False)
        self.B = nn.Linear(d_model, widths["B"], bias=False)
        self.C = nn.Linear(d_model, widths["C"], bias=False)
        self.dt = nn.Linear(d_model, config.num_heads, bias=False)
        kernel, bias = config.conv_kernel, config.conv_bias
        self.conv = nn.ModuleDict(
            {name: CausalConv(width, kernel, bias) for name, width in widths.items()}
        )
        self.dynamics = Dynamics(config)
        group_dim = config.inner() // config.num_groups
        self.norm = GatedGroupRMSNorm(config.inner(), group_dim, config.norm_eps)
        self.out_proj = nn.Linear(config.inner(), d_model, bias=False)

    def project(
        self, x_BTD: Tensor, resets: Tensor | None, state: State | None
    ) -> tuple[dict[str, Any], Tensor, State]:
        """Return the cell's inputs, the skip D x (B, T, H, P), and the convolution's tails."""
        streams, tails = {}, {}
        for name, linear in {"x": self.x, "B": self.B, "C": self.C}.items():
            tail = None if state is None else state[f"conv_{name}"]
            conv = self.conv[name](linear(x_BTD), resets, tail)
            streams[name], tails[f"conv_{name}"] = conv
        v_BTHP = streams["x"].unflatten(-1, (-1, self.config.head_dim))
        log_f, log_i, skip_BTHP = self.dynamics(self.dt(x_BTD), v_BTHP)
        cell = {
            "q": streams["C"].unflatten(-1, (-1, self.config.state_dim)),
            "k": streams["B"].unflatten(-1, (-1, self.config.state_dim)),
            "v": v_BTHP,
            "log_f": log_f,
            "log_i": log_i,
        }
        return cell, skip_BTHP, tails

    def output(self, y: Tensor, skip: Tensor, x: Tensor) -> Tensor:
        """Skip, gate, norm and projection: y and skip (..., H, P), x (..., D) -> (..., D)."""
        return self.out_proj(self.norm((y + skip).flatten(-2), self.z(x)))

    def forward(
        self, x_BTD: Tensor, ctx: Context, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Mix a sequence; see Mixer."""
        cell, skip_BTHP, tails = self.project(x_BTD, ctx.resets, state)
        y_BTHP, after, _ = gated_linear_attention(
            **cell,
            resets=ctx.resets,
            state=None if state is None else {"C": state["C"]},
            scale=1.0,
            gate="plain",
            chunk_size=self.config.chunk_size,
        )
        return self.output(y_BTHP, skip_BTHP, x_BTD), after | tails

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix one token; see Mixer."""
        cell, skip_BTHP, tails = self.project(x_BD[:, None], None, state)
        y_BHP, after = gated_linear_attention_step(
            **{name: x[:, 0] for name, x in cell.items()},
            state={"C": state["C"]},
            scale=1.0,
            gate="plain",
        )
        return self.output(y_BHP, skip_BTHP[:, 0], x_BD), after | tails

    def init_state(self, batch_size: int, device: torch.device) -> State:
        """Return zeros: C (B, H, N, P) in the dynamics' dtype, conv_* (B, kernel - 1, width)."""
        config = self.config
        state = initial_state(
            batch_size,
            config.num_heads,
            config.state_dim,
            config.head_dim,
            gate="plain",
            normalize=False,
            dtype=torch.promote_types(self.dynamics.A_log.dtype, torch.float32),
            device=device,
        )
        for name, conv in self.conv.items():
            state[f"conv_{name}"] = cast(CausalConv, conv).init_state(batch_size, device)
        return state

    def init_weights(self, init: Initializer) -> None:
        """Initialise as the paper's code did; the projections with std and out_std."""
        for linear in (self.z, self.x, self.B, self.C, self.dt):
            init.normal(linear.weight, init.std)
        for conv in self.conv.values():
            cast(CausalConv, conv).init_weights(init)
        self.dynamics.init_weights(init)
        self.norm.init_weights(init)
        init.normal(self.out_proj.weight, init.out_std)

    def tp_plan(self) -> dict[str, str]:
        """Split by heads and groups: projections by column, the out projection by row."""
        return {
            "[zxBC].weight": "column",
            "dt.weight": "column",
            "conv.*": "head",
            "dynamics.*": "head",
            "norm.weight": "head",
            "out_proj.weight": "row",
        }

    def hf_names(self) -> dict[str, str]:
        """Name the parameters as transformers' Mamba-2 layers do.

        Parameters of one name are one matrix there, in this order along its first dim.
        """
        names = {f"{part}.weight": "in_proj.weight" for part in ("z", *self.conv, "dt")}
        for leaf in ("weight", "bias") if self.config.conv_bias else ("weight",):
            names |= {f"conv.{part}.{leaf}": f"conv1d.{leaf}" for part in self.conv}
        names |= {f"dynamics.{part}": part for part in ("A_log", "dt_bias", "D")}
        return names | {"norm.weight": "norm.weight", "out_proj.weight": "out_proj.weight"}
