"""ParaRNN: nonlinear recurrences trained in parallel over time (arXiv 2510.21450)."""

from typing import Annotated, ClassVar, Literal

import torch
from megarec_kernels.newton_rnn import (
    Cell,
    ParaGRUCell,
    ParaLSTMCell,
    Report,
    Solver,
    check_cell,
    newton_rnn,
)
from pydantic import Field
from torch import Tensor, nn

from megarec.config.activations import Activations, Numbers, causal_conv, gated_group_norm
from megarec.config.base import PositiveFloat, PositiveInt
from megarec.config.mixer import MixerConfig
from megarec.models.context import Context
from megarec.models.conv import CausalConv
from megarec.models.init import Initializer
from megarec.models.mixer import Mixer
from megarec.models.norm import GatedGroupRMSNorm
from megarec.models.state import State


class NewtonMixerConfig(MixerConfig):
    """Config of any mixer around a nonlinear cell; a subclass names the cell.

    The state has d_model channels. `num_heads` is the number of diagonal blocks of the input map
    and of groups of the norm. `clip` bounds the recurrent weights after every step, which keeps
    the Jacobian small enough for a few iterations (null: no bound). Newton makes `iterations`,
    or fewer where `early_stop` looks at the residual after each; a solution with a residual above
    `tolerance` is not used: the cell then walks through the tokens one by one, or training stops,
    as `on_failure` says (tolerance .inf: any finite solution is used).
    """

    cell: ClassVar[Cell]

    num_heads: PositiveInt = 4
    conv_kernel: PositiveInt = 4
    norm_eps: PositiveFloat = 1e-6
    clip: PositiveFloat | None = 0.5
    iterations: PositiveInt = 3
    tolerance: Annotated[float, Field(gt=0)] = 1e-3
    early_stop: bool = False
    on_failure: Literal["sequential", "raise"] = "sequential"

    def problems(self, d_model: int) -> list[str]:
        """Heads must divide the width, and the cell be what it declares."""
        problems = []
        if d_model % self.num_heads:
            problems.append(f"num_heads={self.num_heads} does not divide d_model={d_model}")
        try:
            check_cell(self.cell)
        except ValueError as error:
            problems.append(f"cell: {error}")
        return problems

    def tp_sizes(self) -> dict[str, int]:
        """Heads: channels meet only inside of one."""
        return {"num_heads": self.num_heads}

    def num_params(self, d_model: int) -> int:
        """Count x, z, out projection; input map and its bias; recurrence, convolution, norm."""
        inputs = self.cell.num_inputs
        matrices = 3 * d_model * d_model + inputs * d_model * d_model // self.num_heads
        rows = inputs + sum(self.cell.recurrent.values()) + self.conv_kernel + 1 + 1
        return matrices + rows * d_model

    def flops_per_token(self, d_model: int, seq_len: int) -> float:
        """Count matmuls: projections and the input map; the solver multiplies no matrices."""
        inputs = self.cell.num_inputs
        return 2.0 * (3 * d_model * d_model + inputs * d_model * d_model // self.num_heads)

    def state_bytes(self, d_model: int, seq_len: int) -> int:
        """The cell's state and the convolution's last inputs."""
        return 4 * d_model * (self.cell.num_slots + self.conv_kernel - 1)

    def activations(self, d_model: int, seq_len: int) -> Activations:
        """Count x, the convolution, the cell's inputs and states, the norm.

        At work are the Jacobian, its copy in blocks and the products of the scan, with as many
        numbers as it has each.
        """
        inputs, slots = self.cell.num_inputs, self.cell.num_slots
        jacobian = slots if self.cell.structure == "diagonal" else slots * slots
        return Activations(
            kept=Numbers(narrow=3 * d_model, wide=(inputs + slots) * d_model)
            + causal_conv(d_model)
            + gated_group_norm(d_model, self.num_heads),
            saved=Numbers(narrow=(3 + inputs) * d_model),
            work=Numbers(wide=(4 * jacobian + 4 * slots + 6) * d_model),
        )

    def build(self, d_model: int) -> "NewtonMixer":
        """Build the module."""
        return NewtonMixer(self, d_model)


class ParaGRUConfig(NewtonMixerConfig):
    """Config of the ParaGRU mixer (eq. 3.1a): a diagonal Jacobian."""

    type: Literal["para_gru"] = "para_gru"
    cell: ClassVar[Cell] = ParaGRUCell()


class ParaLSTMConfig(NewtonMixerConfig):
    """Config of the ParaLSTM mixer (eq. 3.1b): a 2 x 2 Jacobian a channel."""

    type: Literal["para_lstm"] = "para_lstm"
    cell: ClassVar[Cell] = ParaLSTMCell()


class Recurrence(nn.Module):
    """The cell's own parameters, which stay in float32, and the solution of its recurrence."""

    def __init__(self, config: NewtonMixerConfig, d_model: int) -> None:
        super().__init__()
        self.cell = config.cell
        self.clip = config.clip
        self.solver = Solver(
            config.iterations, config.tolerance, config.early_stop, config.on_failure
        )
        self.bias = nn.Parameter(torch.empty(self.cell.num_inputs, d_model))
        self.weights = nn.ParameterDict(
            {name: torch.empty(rows, d_model) for name, rows in self.cell.recurrent.items()}
        )
        self.reports: list[Report] = []

    def forward(
        self, u_BTVD: Tensor, resets: Tensor | None, state_BKD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return what the cell shows (B, T, D) and its last state (B, K, D), float32 at least."""
        h_BTKD, last_BKD, report = newton_rnn(
            self.cell,
            u_BTVD + self.bias,
            dict(self.weights.items()),
            state=state_BKD,
            resets=resets,
            solver=self.solver,
        )
        if self.training and report.residuals:
            self.reports.append(report)
        return self.cell.output(h_BTKD), last_BKD

    @torch.no_grad()
    def constrain_(self) -> None:
        """Project the recurrent weights into [-clip, clip]."""
        if self.clip is not None:
            for weight in self.weights.values():
                weight.clamp_(-self.clip, self.clip)

    def init_weights(self, init: Initializer) -> None:
        """Draw the recurrent weights (Xavier, normal), clipped; the bias is 0."""
        clip = float("inf") if self.clip is None else self.clip
        for weight in self.weights.values():
            std = (2 / sum(weight.shape)) ** 0.5
            init.normal(weight, std, then=lambda drawn: drawn.clamp_(-clip, clip))
        init.constant(self.bias, 0.0)


class NewtonMixer(Mixer):
    """y = out_proj(norm(h * silu(z))), h the cell's outputs for conv(x).

    The published block (arXiv 2510.21450, figure 9). Shapes: B batch, T time, D d_model, H heads,
    V inputs of a channel, K slots of a state.
    """

    float32_modules = ("recurrence",)

    def __init__(self, config: NewtonMixerConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        head_dim = d_model // config.num_heads
        self.x = nn.Linear(d_model, d_model, bias=False)
        self.z = nn.Linear(d_model, d_model, bias=False)
        self.conv = CausalConv(d_model, config.conv_kernel, bias=True)
        # Head h maps its slice of x to its slice of each of the V inputs.
        self.input_map = nn.Parameter(
            torch.empty(config.num_heads, head_dim, config.cell.num_inputs, head_dim)
        )
        self.recurrence = Recurrence(config, d_model)
        self.norm = GatedGroupRMSNorm(d_model, head_dim, config.norm_eps)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def project(self, x_BTD: Tensor) -> Tensor:
        """Map what the convolution gives, (B, T, D), to the cell's inputs (B, T, V, D)."""
        heads = x_BTD.unflatten(-1, (self.input_map.shape[0], -1))
        return torch.einsum("bthi,hivd->btvhd", heads, self.input_map).flatten(-2)

    def forward(
        self, x_BTD: Tensor, ctx: Context, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Mix a sequence; see Mixer."""
        state = state or {}
        conv_BTD, tail = self.conv(self.x(x_BTD), ctx.resets, state.get("conv"))
        h_BTD, last = self.recurrence(self.project(conv_BTD), ctx.resets, state.get("h"))
        return self.out_proj(self.norm(h_BTD, self.z(x_BTD))), {"h": last, "conv": tail}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix one token; see Mixer. A sequence of one token takes one step of the cell."""
        y_BTD, state = self(x_BD[:, None], Context(), state)
        return y_BTD[:, 0], state

    def init_state(self, batch_size: int, device: torch.device) -> State:
        """Return zeros: h (B, K, D) in the recurrence's dtype, conv (B, kernel - 1, D)."""
        dtype = torch.promote_types(self.recurrence.bias.dtype, torch.float32)
        shape = (batch_size, self.config.cell.num_slots, self.recurrence.bias.shape[-1])
        return {
            "h": torch.zeros(shape, dtype=dtype, device=device),
            "conv": self.conv.init_state(batch_size, device),
        }

    def init_weights(self, init: Initializer) -> None:
        """Draw the input map as the paper did (Kaiming, uniform), the projections with std."""
        init.normal(self.x.weight, init.std)
        init.normal(self.z.weight, init.std)
        self.conv.init_weights(init)
        bound = (6 / self.input_map.shape[1]) ** 0.5
        init.uniform(self.input_map, -bound, bound)
        self.recurrence.init_weights(init)
        self.norm.init_weights(init)
        init.normal(self.out_proj.weight, init.out_std)

    def constrain_(self) -> None:
        """Clip the recurrent weights; see Mixer."""
        self.recurrence.constrain_()

    def metrics(self) -> dict[str, float]:
        """Return the largest residual, the most iterations, and the share of solves that fell back.

        A share, since how many there are depends on micro-batches and recomputation.
        """
        reports, self.recurrence.reports = self.recurrence.reports, []
        if not reports:
            return {}
        return {
            "newton/residual": max(report.residuals[-1] for report in reports),
            "newton/iterations": max(report.iterations for report in reports),
            "newton/fallbacks": sum(report.fell_back for report in reports) / len(reports),
        }

    def tp_plan(self) -> dict[str, str]:
        """Split by channels, head by head; they are the last dim of the recurrence's parameters."""
        return {
            "[xz].weight": "column",
            "conv.*": "head",
            "input_map": "head",
            "recurrence.*": "row",
            "norm.weight": "head",
            "out_proj.weight": "row",
        }

    def hf_names(self) -> dict[str, str]:
        """Name the parameters as the modeling file of an export does: as they are here."""
        return {name: name for name, _ in self.named_parameters()}
