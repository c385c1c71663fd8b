"""The ParaRNN mixer: its equations, initial weights, fallback, decoding, precision, bad configs."""

from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from megarec_kernels.newton_rnn import Cell, ParaGRUCell, newton_rnn
from small import layers_tree, random_model, run_config
from torch import Tensor
from torch.nn import functional as F

from megarec.config.loader import validate_config
from megarec.config.mixer import MixerConfig
from megarec.config.model import ModelConfig
from megarec.errors import UserError
from megarec.models import build_model
from megarec.models.context import Context
from megarec.models.mixers.para_rnn import NewtonMixer, NewtonMixerConfig
from megarec.optim.build import is_decayed

TYPES = ("para_gru", "para_lstm")
types = pytest.mark.parametrize("kind", TYPES)
EXACT = {"iterations": 12, "tolerance": 1e-12, "on_failure": "raise"}
NEVER = {"iterations": 1, "tolerance": 1e-15}
"""What no solution meets."""


def config(*mixers: dict[str, Any], **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(layers_tree(*mixers, **changes))


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def token_ids(*shape: int) -> Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(0))


def naive(mixer: NewtonMixer, x_TD: Tensor) -> Tensor:
    """One row, token by token and head by head, from the equations of arXiv 2510.21450.

    v = silu(conv(W_x x) + b); u_h = B_h v_h + b_h; h = cell(h', u);
    y = W_out (norm(h silu(W_z x)) w), the norm over each head's channels.
    """
    p = {name: value.double() for name, value in mixer.named_parameters()}
    H, W, V, _ = p["input_map"].shape
    A, C = p["recurrence.weights.A"], p.get("recurrence.weights.C")
    c, h = torch.zeros(2, H * W).double()
    before, ys = [torch.zeros(H * W).double()] * 3, []
    for x_D in x_TD:
        before.append(p["x.weight"] @ x_D)
        conv_D = F.silu(
            sum(p["conv.weight"][:, 0, k] * before[k - 4] for k in range(4)) + p["conv.bias"]
        )
        u = p["recurrence.bias"].clone()
        for head in range(H):
            part = slice(head * W, (head + 1) * W)
            for v in range(V):
                u[v, part] += conv_D[part] @ p["input_map"][head, :, v]
        if C is None:
            z, r = torch.sigmoid(A[0] * h + u[0]), torch.sigmoid(A[1] * h + u[1])
            h = (1 - z) * h + z * torch.tanh(A[2] * h * r + u[2])
        else:
            f = torch.sigmoid(A[0] * h + C[0] * c + u[0])
            c = f * c + (1 - f) * torch.tanh(A[2] * h + u[2])
            h = torch.sigmoid(A[1] * h + C[1] * c + u[1]) * torch.tanh(c)
        gated = (h * F.silu(p["z.weight"] @ x_D)).view(H, W)
        normed = gated / (gated.square().mean(-1, keepdim=True) + mixer.config.norm_eps).sqrt()
        ys.append(p["out_proj.weight"] @ (normed.flatten() * p["norm.weight"]))
    return torch.stack(ys)


@types
@pytest.mark.parametrize("heads", [1, 4, 32])
def test_equals_the_equations(kind: str, heads: int) -> None:
    layer = random_model(config({"type": kind, "num_heads": heads, **EXACT})).blocks["0"].mixer
    x_BTD = inputs(2, 11, 32)
    expected = torch.stack([naive(layer, x_TD) for x_TD in x_BTD])
    y_BTD, _ = layer.double()(x_BTD, Context())
    torch.testing.assert_close(y_BTD, expected, rtol=1e-10, atol=1e-12)


@types
@pytest.mark.parametrize("clip", [0.5, 0.01, None])
def test_the_initial_weights_of_the_paper(kind: str, clip: float | None) -> None:
    wide = config({"type": kind, "clip": clip}, d_model=512)
    layer = build_model(wide, seed=3).blocks["0"].mixer
    assert all(p.dtype == torch.float32 for p in layer.parameters())
    # Xavier, normal; clipped, which 0.5 does to next to none.
    for weight in layer.recurrence.weights.values():
        rows = weight.shape[0]
        if clip == 0.01:
            assert weight.abs().max() == clip
        else:
            assert weight.std().item() == pytest.approx((2 / (rows + 512)) ** 0.5, rel=0.1)
    assert not layer.recurrence.bias.any() and (layer.norm.weight == 1).all()
    # Kaiming, uniform, with a head's inputs: the largest of 200,000 comes near the bound.
    bound = (6 / 128) ** 0.5
    assert bound * 0.99 < layer.input_map.abs().max() <= bound
    assert layer.input_map.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    small, wang = (2 / (5 * 512)) ** 0.5, 2 / 512**0.5
    for linear, std in ((layer.x, small), (layer.z, small), (layer.out_proj, wang)):
        assert linear.weight.std().item() == pytest.approx(std, rel=0.02)


def test_which_parameters_decay_and_which_keep_float32() -> None:
    model = build_model(config({"type": "para_lstm"}))
    kept = {name for name, p in model.named_parameters() if not is_decayed(name, p)}
    names = ("mixer_norm.weight", "mixer.norm.weight", "mixer.conv.bias", "mixer.recurrence.bias")
    assert kept == {f"blocks.0.{name}" for name in names} | {"embedding.weight", "norm.weight"}
    (module,) = model.blocks["0"].float32_modules()
    assert {name for name, _ in module.named_parameters()} == {"bias", "weights.A", "weights.C"}


def test_metrics_are_those_since_the_last_call() -> None:
    model = build_model(config({"type": "para_gru", **NEVER})).train()
    assert model.metrics() == {}
    model(token_ids(2, 9))
    model.eval()(token_ids(2, 9))
    reports = model.blocks["0"].mixer.recurrence.reports
    assert len(reports) == 1
    assert model.metrics()["newton/residual"] == reports[0].residuals[-1] > 1e-12
    assert model.metrics() == {}


def test_a_fallback_is_exact() -> None:
    ids = token_ids(2, 21)
    tried = random_model(config({"type": "para_lstm", **NEVER})).double()
    solved = random_model(config({"type": "para_lstm", **EXACT})).double()
    torch.testing.assert_close(tried(ids), solved(ids), rtol=0, atol=1e-10)


@types
def test_a_decoded_token_is_one_step_of_the_cell(kind: str, monkeypatch: Any) -> None:
    model = random_model(config({"type": kind}, {"type": kind}))
    cell_class = type(model.config.layers[0].mixer.cell)
    step, calls = cell_class.step, []
    monkeypatch.setattr(
        cell_class,
        "step",
        lambda self, state, u, params: calls.append(state.shape) or step(self, state, u, params),
    )

    def no_jacobian(*_: Any) -> Any:
        raise AssertionError("a step needs no Jacobian")

    monkeypatch.setattr(cell_class, "jacobian", no_jacobian)
    state = model.init_state(3)
    shapes = {key: value.shape for key, value in state.items()}
    for ids_B in token_ids(5, 3):
        calls.clear()
        _, state = model.step(ids_B, state)
        assert calls == [(3, model.config.layers[0].mixer.cell.num_slots, 32)] * 2
        assert {key: value.shape for key, value in state.items()} == shapes
        for value in state.values():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_the_learned_skip_scales_what_the_mixer_adds_to() -> None:
    tree = layers_tree(*[{"type": "para_gru", **EXACT}] * 2)
    for name, skip in (("b0", True), ("b1", False)):
        tree["blocks"][name] |= {"learned_skip": skip, "residual_scale": 0.5, "ffn": {"d_ff": 48}}
    model = build_model(ModelConfig.model_validate(tree))
    assert (model.blocks["0"].skip.weight == 1).all()
    assert [n for n, _ in model.named_parameters() if "skip" in n] == ["blocks.0.skip.weight"]
    block = random_model(model.config).double().blocks["0"]
    x_BTD = inputs(2, 7, 32)
    y_BTD, _ = block.mixer(block.mixer_norm(x_BTD), Context())
    middle_BTD = x_BTD * block.skip.weight + 0.5 * y_BTD
    expected = middle_BTD + 0.5 * block.ffn(block.ffn_norm(middle_BTD))
    found, _ = block(x_BTD, Context())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    state = block.init_state(2, x_BTD.device)
    for t in range(7):
        found_BD, state = block.step(x_BTD[:, t], state)
        torch.testing.assert_close(found_BD, expected[:, t], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="learned_skip=true: the block has no mixer to skip"):
        ModelConfig.model_validate(
            layers_tree() | {"blocks": {"f": {"ffn": {"d_ff": 48}, "learned_skip": True}}}
        )


@types
def test_bfloat16_keeps_the_recurrence_in_float32(kind: str) -> None:
    """Its states are those of float32 for the same, rounded, inputs; bit by bit."""
    model = random_model(config({"type": kind})).bfloat16()
    layer = model.blocks["0"].mixer
    layer.recurrence.float()
    x_BTD = inputs(2, 21, 32, dtype=torch.bfloat16)
    seen = []
    layer.recurrence.register_forward_hook(lambda *call: seen.append(call[1:]))
    y_BTD, state = layer(x_BTD, Context())
    ((u_BTVD, _, _), (h_BTD, last_BKD)) = seen[0]
    assert u_BTVD.dtype == y_BTD.dtype == state["conv"].dtype == torch.bfloat16
    assert h_BTD.dtype == last_BKD.dtype == state["h"].dtype == torch.float32
    recurrence = layer.recurrence
    u_BTVD = u_BTVD.float() + recurrence.bias
    expected, _, _ = newton_rnn(recurrence.cell, u_BTVD, dict(recurrence.weights.items()))
    assert torch.equal(h_BTD, recurrence.cell.output(expected))


class Wrong(ParaGRUCell):
    """Its Jacobian has another shape than it declares."""

    structure: ClassVar[Any] = "block"


MIXER = "model.blocks.b0.mixer"
BAD: dict[str, tuple[Any, str]] = {
    "iterations": (0, "iterations=0: Input should be greater than or equal to 1"),
    "iterations ": (-1, "iterations=-1: Input should be greater than or equal to 1"),
    "tolerance": (0.0, "tolerance=0.0: Input should be greater than 0"),
    "tolerance ": (torch.nan, "tolerance=nan: Input should be greater than 0"),
    "clip": (0.0, "clip=0.0: Input should be greater than 0"),
    "on_failure": ("warn", "on_failure='warn': Input should be 'sequential' or 'raise'"),
    "early_stop": ("yes", "early_stop='yes': Input should be a valid boolean"),
    "max_its": (3, "max_its=3: unknown key"),
}


def line_of(mixer: dict[str, Any]) -> str:
    tree = run_config().model_dump(mode="json") | {"model": layers_tree(mixer)}
    with pytest.raises(UserError) as caught:
        validate_config(tree, "recipe.yaml")
    (line,) = caught.value.lines
    assert "\n" not in line
    return line.removeprefix("recipe.yaml: ")


@types
@pytest.mark.parametrize("key", BAD)
def test_a_bad_option_is_one_line(kind: str, key: str) -> None:
    value, expected = BAD[key]
    line = line_of({"type": kind, key.strip(): value})
    assert line.startswith(f"{MIXER}.{expected}")


@types
def test_heads_that_do_not_divide_the_width(kind: str) -> None:
    expected = "model: blocks.b0.mixer.num_heads=3 does not divide d_model=32"
    assert line_of({"type": kind, "num_heads": 3}) == expected


def test_a_cell_that_is_not_what_it_declares() -> None:
    with patch.dict(MixerConfig.members):

        class WrongConfig(NewtonMixerConfig):
            type: str = "wrong"
            cell: ClassVar[Cell] = Wrong()

        assert line_of({"type": "wrong"}).startswith(
            "model: blocks.b0.mixer.cell: Wrong: jacobian: got shape (3, 1, 4), "
            "expected (3, 1, 1, 4): structure 'block'"
        )
