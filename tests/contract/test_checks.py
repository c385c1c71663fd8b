"""A contract is worth what it refuses: each check fails for a mixer that breaks its rule."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.retention import Retention, RetentionConfig
from torch import Tensor

from megarec.config.activations import Activations, Numbers, causal_conv
from megarec.config.mixer import MixerConfig
from megarec.config.model import FFNConfig
from megarec.errors import UserError
from megarec.models.context import Context
from megarec.models.init import Initializer
from megarec.models.mixers.attention import AttentionConfig
from megarec.models.mixers.mamba2 import Mamba2Config
from megarec.models.mixers.mlstm import MLSTMConfig
from megarec.models.state import State
from megarec.testing.case import close
from megarec.testing.contract import CHECKS, Case, small_model

RETENTION = {"type": "retention", "num_heads": 2, "chunk_size": 8}
Output = tuple[Tensor, State]
forward, step, num_params = Retention.forward, Retention.step, RetentionConfig.num_params


def another_step(self: Retention, x: Tensor, state: State) -> Output:
    y, state = step(self, x, state)
    return y * (1 + 1e-6), state


def forgets_state(self: Retention, x: Tensor, ctx: Context, state: State | None = None) -> Output:
    return forward(self, x, ctx, None)


def no_resets(self: Retention, x: Tensor, ctx: Context, state: State | None = None) -> Output:
    return forward(self, x, Context(), state)


def leaks_a_bit(self: Retention, x: Tensor, ctx: Context, state: State | None = None) -> Output:
    y, state = forward(self, x, ctx, state)
    return y + 1e-6 * x.cumsum(1), state


def no_fences(self: Retention, x: Tensor, ctx: Context, state: State | None = None) -> Output:
    return forward(self, x, Context() if ctx.exact else ctx, state)


def looks_ahead(self: Retention, x: Tensor, ctx: Context, state: State | None = None) -> Output:
    y, state = forward(self, x, ctx, state)
    return y + 1e-6 * x.roll(-1, 1), state


def detached(self: Retention, x: Tensor, ctx: Context, state: State | None = None) -> Output:
    return forward(self, x.detach(), ctx, state)


def differs_each_time(
    self: Retention, x: Tensor, ctx: Context, state: State | None = None
) -> Output:
    self.num_calls = getattr(self, "num_calls", 0) + 1
    y, state = forward(self, x, ctx, state)
    return y * (1 + 1e-3 * self.num_calls), state


def adds_input(self: Retention, x: Tensor, ctx: Context, state: State | None = None) -> Output:
    y, state = forward(self, x, ctx, state)
    return y + x, state


def narrow_memory(self: Retention, x: Tensor, ctx: Context, state: State | None = None) -> Output:
    y, state = forward(self, x, ctx, state)
    return y, {"C": state["C"].to(x.dtype)}


def all_alike(self: Retention, init: Initializer) -> None:
    for parameter in self.parameters():
        init.constant(parameter, 0.1)


def half_refused(model: object, folder: Path) -> None:
    folder.with_name("rest").touch()
    raise UserError("export to xlstm: blocks.block.mixer: not an mlstm")


# check -> what to replace by what.
DEFECTS: dict[str, tuple[object, str, object]] = {
    "steps": (Retention, "step", another_step),
    "chunks": (Retention, "forward", forgets_state),
    "packed": (Retention, "forward", no_resets),
    "isolation": (Retention, "forward", leaks_a_bit),
    "padding": (Retention, "forward", no_fences),
    "causality": (Retention, "forward", looks_ahead),
    "gradients": (Retention, "forward", detached),
    "recomputation": (Retention, "forward", differs_each_time),
    "bfloat16": (Retention, "forward", narrow_memory),
    "sizes": (RetentionConfig, "num_params", lambda self, d_model: num_params(self, d_model) + 1),
    "flops": (RetentionConfig, "flops_per_token", lambda self, d_model, seq_len: 6.0 * d_model),
    "activations": (
        RetentionConfig,
        "activations",
        lambda self, d, n: FFNConfig(d_ff=d).activations(d),
    ),
    "declarations": (Retention, "tp_plan", lambda self: {"*.weight": "row"}),
    "division": (Retention, "forward", adds_input),
    "seeds": (Retention, "init_weights", all_alike),
    "checkpoint": ("megarec.checkpoint.dcp", "read", lambda folder, tensors: None),
    "export": ("megarec.conversion", "export_hf", half_refused),
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_defect_is_found(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, defect = DEFECTS[check]
    if isinstance(where, str):
        monkeypatch.setattr(f"{where}.{name}", defect)
    else:
        monkeypatch.setattr(where, name, defect)
    with pytest.raises(AssertionError):
        CHECKS[check](Case(small_model(RETENTION)))


# What a wrong formula would add to flops_per_token(d_model, seq_len).
Formula = Callable[[Any, int, int], float]
WRONG_FLOPS: dict[str, tuple[MixerConfig, Formula]] = {
    "mlstm without gates": (
        MLSTMConfig(num_heads=2, chunk_size=8),
        lambda c, d, n: -4.0 * d * c.num_heads,
    ),
    "mlstm without chunks": (
        MLSTMConfig(num_heads=2, chunk_size=8),
        lambda c, d, n: -min(n, 8) * (c.qk_dim(d) + c.v_dim(d)),
    ),
    "mlstm with whole chunks": (
        MLSTMConfig(num_heads=2, chunk_size=8),
        lambda c, d, n: min(n, 8) * (c.qk_dim(d) + c.v_dim(d)),
    ),
    "mlstm without reading the state": (
        MLSTMConfig(num_heads=2, chunk_size=8),
        lambda c, d, n: -2.0 * c.qk_dim(d) // c.num_heads * c.v_dim(d),
    ),
    "mamba2 with scores a head": (
        Mamba2Config(num_heads=4, head_dim=8, state_dim=8, chunk_size=8),
        lambda c, d, n: min(n, 8) * 8 * 3,
    ),
    "mamba2 without step sizes": (
        Mamba2Config(num_heads=4, head_dim=8, state_dim=8, chunk_size=8),
        lambda c, d, n: -2.0 * d * c.num_heads,
    ),
    "attention that is not causal": (
        AttentionConfig(num_heads=2),
        lambda c, d, n: 2.0 * d * (n - 1),
    ),
    "attention with too wide a window": (
        AttentionConfig(num_heads=2, window=5),
        lambda c, d, n: 4.0 * d * max(0, n - 5) / n,
    ),
}


@pytest.mark.parametrize("name", WRONG_FLOPS)
def test_a_wrong_formula_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, wrong = WRONG_FLOPS[name]
    right = type(config).flops_per_token
    case = Case(small_model(config.model_dump()))
    CHECKS["flops"](case)
    monkeypatch.setattr(
        type(config),
        "flops_per_token",
        lambda self, d_model, seq_len: (
            right(self, d_model, seq_len) + wrong(self, d_model, seq_len)
        ),
    )
    with pytest.raises(AssertionError, match="flops_per_token"):
        CHECKS["flops"](case)


# What a wrong formula would add to what is kept (d_model, seq_len).
WRONG_ACTIVATIONS: dict[str, tuple[MixerConfig, Callable[[Any, int, int], Numbers]]] = {
    "mlstm without the states of chunks": (
        MLSTMConfig(num_heads=2, chunk_size=8),
        lambda c, d, n: Numbers(wide=-(c.state_bytes(d, n) / 4) * (1 / 8 + 1 / n)),
    ),
    "mlstm without float32 copies": (
        MLSTMConfig(num_heads=2, chunk_size=8),
        lambda c, d, n: Numbers(copies=-2 * d),
    ),
    "mamba2 without the convolution": (
        Mamba2Config(num_heads=2, num_groups=2, head_dim=4, state_dim=16, chunk_size=8),
        lambda c, d, n: Numbers() - causal_conv(sum(c.stream_widths().values())),
    ),
    "attention without keys and values": (
        AttentionConfig(num_heads=2),
        lambda c, d, n: Numbers(narrow=-2 * d),
    ),
}


@pytest.mark.parametrize("name", WRONG_ACTIVATIONS)
def test_a_wrong_estimate_of_memory_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, wrong = WRONG_ACTIVATIONS[name]
    right = type(config).activations
    case = Case(small_model(config.model_dump()))
    CHECKS["activations"](case)
    monkeypatch.setattr(
        type(config),
        "activations",
        lambda self, d, n: right(self, d, n) + Activations(kept=wrong(self, d, n)),
    )
    with pytest.raises(AssertionError, match="activations"):
        CHECKS["activations"](case)


def test_an_adaptive_solver_may_be_less_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Retention, "step", another_step)
    CHECKS["steps"](Case(small_model(RETENTION), tolerance=1e-4))
    monkeypatch.setattr(Retention, "forward", looks_ahead)
    CHECKS["causality"](Case(small_model(RETENTION), tolerance=1e-4))


def test_a_nan_is_not_close() -> None:
    for tolerance in (0.0, 1.0):
        with pytest.raises(AssertionError, match="y: "):
            close("y", torch.full((2,), torch.nan), torch.ones(2), tolerance)
