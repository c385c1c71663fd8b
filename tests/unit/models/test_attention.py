"""The attention mixer: positions, caches, window, QK norm, scale, partial RoPE, padding."""

import math
from typing import Any

import pytest
import torch
from small import model_config, random_model
from torch import Tensor
from torch.nn import functional as F

from megarec.config.model import ModelConfig
from megarec.models.context import Context, positions
from megarec.models.mixers.attention import Attention, AttentionConfig
from megarec.models.rotary import RotaryConfig


def config(num_layers: int = 1, **mixer: Any) -> ModelConfig:
    mixer = {"type": "attention", "num_heads": 4, "num_kv_heads": 2} | mixer
    return model_config(num_layers=num_layers, blocks={"*": {"mixer": mixer}}, pattern="*")


def random_mixer(**mixer: Any) -> Attention:
    return random_model(config(**mixer)).double().blocks["0"].mixer


def inputs(*shape: int) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def test_positions_start_over_with_each_document() -> None:
    resets = torch.tensor(
        [[False, False, True, True, False], [True, False, False, False, True], [False] * 5]
    )
    first = torch.tensor([7, 7, 2])
    assert positions(5, resets, first).tolist() == [
        [7, 8, 0, 0, 1],
        [0, 1, 2, 3, 0],
        [2, 3, 4, 5, 6],
    ]
    assert positions(3, None, first).tolist() == [[7, 8, 9], [7, 8, 9], [2, 3, 4]]


def turned(x_TK: Tensor, rope: RotaryConfig) -> Tensor:
    """Dimensions r and r + half are one complex number, which turns as positions go by."""
    T, half = len(x_TK), rope.size(x_TK.shape[1]) // 2
    angle_TR = torch.outer(torch.arange(T), rope.base ** -(torch.arange(half).double() / half))
    number_TR = torch.complex(x_TK[:, :half], x_TK[:, half : 2 * half]) * torch.exp(1j * angle_TR)
    return torch.cat([number_TR.real, number_TR.imag, x_TK[:, 2 * half :]], 1)


def naive(mixer: Attention, x_TD: Tensor) -> Tensor:
    """One document, head by head and pair by pair of tokens, from the docstring of the config."""
    c, K = mixer.config, mixer.head_dim
    w = {name: p.double() for name, p in mixer.named_parameters()}
    T = len(x_TD)
    heads = []
    for h in range(c.num_heads):
        g = h // (c.num_heads // c.kv_heads())
        q, k, v = (
            x_TD @ w[f"{name}.weight"][head * K : (head + 1) * K].T
            for name, head in (("q", h), ("k", g), ("v", g))
        )
        if c.qk_norm:
            q = q / (q.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * w["q_norm.weight"]
            k = k / (k.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * w["k_norm.weight"]
        if c.rope is not None:
            q, k = turned(q, c.rope), turned(k, c.rope)
        rows = []
        for t in range(T):
            oldest = 0 if c.window is None else max(0, t - c.window + 1)
            scale = c.scale or 1 / math.sqrt(K)
            weights = F.softmax(k[oldest : t + 1] @ q[t] * scale, 0)
            rows.append(weights @ v[oldest : t + 1])
        heads.append(torch.stack(rows))
    return torch.cat(heads, -1) @ w["out_proj.weight"].T


VARIANTS: list[dict[str, Any]] = [
    {},
    {"rope": None},
    {"rope": {"base": 100.0, "fraction": 0.5}},
    {"qk_norm": True, "norm_eps": 0.01},
    {"scale": 0.9},
    {"window": 1},
    {"window": 4},
    {"num_kv_heads": 1, "head_dim": 6},
    {"num_heads": 1, "num_kv_heads": None},
    {"qk_norm": True, "rope": {"fraction": 0.25}, "window": 3, "scale": 2.0, "head_dim": 16},
]
variants = pytest.mark.parametrize(
    "mixer",
    VARIANTS,
    ids=lambda mixer: ", ".join(f"{key} {value}" for key, value in mixer.items()) or "plain",
)


@variants
def test_equals_the_formulas(mixer: dict[str, Any]) -> None:
    layer = random_mixer(**mixer)
    x_BTD = inputs(2, 9, 32)
    expected = torch.stack([naive(layer, x_TD) for x_TD in x_BTD])
    y_BTD, _ = layer(x_BTD, Context())
    torch.testing.assert_close(y_BTD, expected, rtol=1e-10, atol=1e-12)
    # Packed documents: the same formulas for each of them, from position 0 on.
    ctx = Context.from_doc_ids(torch.tensor([[0] * 4 + [1] * 5] * 2))
    y_BTD, _ = layer(x_BTD, ctx)
    for row, x_TD in enumerate(x_BTD):
        both = torch.cat([naive(layer, x_TD[:4]), naive(layer, x_TD[4:])])
        torch.testing.assert_close(y_BTD[row], both, rtol=1e-10, atol=1e-12)


@variants
def test_a_cache_built_in_pieces(mixer: dict[str, Any]) -> None:
    """Also where documents start within the pieces and rows differ."""
    layer = random_mixer(**mixer)
    x_BTD = inputs(2, 14, 32)
    ctx = Context.from_doc_ids(torch.tensor([[0] * 7 + [1] * 7, [0] * 2 + [1] * 3 + [2] * 9]))
    whole, after = layer(x_BTD, ctx)
    state = layer.init_state(2, x_BTD.device)
    ys = []
    for start, end in ((0, 1), (1, 4), (4, 9), (9, 10), (10, 14)):
        piece = slice(start, end)
        y, state = layer(x_BTD[:, piece], ctx.narrow(piece), state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=1e-10, atol=1e-12)
    assert state["pos"].tolist() == after["pos"].tolist() == [7, 9]
    for name in "kv":
        torch.testing.assert_close(state[name], after[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [1, 4])
def test_the_cache_of_a_window_stops_growing(window: int) -> None:
    layer = random_mixer(window=window)
    state = layer.init_state(2, torch.device("cpu"))
    x_BTD = inputs(2, 12, 32)
    whole, after = layer(x_BTD, Context())
    for t in range(12):
        y, state = layer.step(x_BTD[:, t], state)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-10, atol=1e-12)
        assert state["k"].shape[1] == state["v"].shape[1] == min(t + 1, window - 1)
        assert state["pos"].tolist() == [t + 1] * 2
        nbytes = sum(x[0].numel() * 4 for name, x in state.items() if name != "pos") + 8
        assert nbytes == layer.config.state_bytes(32, t + 1)
    assert after["k"].shape == state["k"].shape


def test_without_a_window_the_cache_grows_by_a_token() -> None:
    layer = random_mixer(head_dim=6)
    state = layer.init_state(3, torch.device("cpu"))
    assert state["k"].shape == state["v"].shape == (3, 0, 2, 6)
    for t in range(3):
        _, state = layer.step(inputs(3, 32), state)
        assert state["k"].shape == (3, t + 1, 2, 6)


def test_rows_padded_on_the_left_equal_each_alone() -> None:
    layer = random_mixer(window=5)
    x_BTD = inputs(3, 9, 32)
    lengths = torch.tensor([9, 4, 1])
    ctx = Context.left_padded(lengths, 9)
    y_BTD, state = layer(x_BTD, ctx)
    steps = inputs(3, 4, 32) + 1
    after = [layer.step(steps[:, 0], state)[0]]
    later, _ = layer(steps, Context(), state)
    for row, length in enumerate(lengths.tolist()):
        alone = torch.cat([x_BTD[row : row + 1, 9 - length :], steps[row : row + 1]], 1)
        expected, _ = layer(alone, Context())
        torch.testing.assert_close(y_BTD[row, 9 - length :], expected[0, :length])
        torch.testing.assert_close(later[row], expected[0, length:])
        torch.testing.assert_close(after[0][row], expected[0, length])


def test_no_positions_means_order_only_by_causality() -> None:
    """Without RoPE the last token sees a set: the order of those before does not matter."""
    layer = random_mixer(rope=None)
    x_BTD = inputs(1, 6, 32)
    mixed = x_BTD[:, [3, 0, 4, 1, 2, 5]]
    a, b = layer(x_BTD, Context())[0][:, -1], layer(mixed, Context())[0][:, -1]
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    turned = random_mixer()
    a, b = turned(x_BTD, Context())[0][:, -1], turned(mixed, Context())[0][:, -1]
    assert (a - b).abs().max() > 1e-3


def test_bfloat16_with_a_float32_cache() -> None:
    """Carried state may be of another dtype than the activations; the output is of theirs."""
    layer = random_mixer(qk_norm=True)
    x_BTD = inputs(2, 6, 32)
    exact, _ = layer(x_BTD, Context())
    _, state = layer.float()(x_BTD[:, :4].float(), Context())
    y, after = layer.bfloat16()(x_BTD[:, 4:].bfloat16(), Context(), state)
    assert y.dtype == after["k"].dtype == torch.bfloat16
    assert (y.double() - exact[:, 4:]).abs().max() < 0.05 * exact.abs().max()


def test_sizes_by_hand() -> None:
    config = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=3, qk_norm=True)
    assert config.num_params(32) == 32 * (4 + 2 + 2) * 8 + 4 * 8 * 32 + 2 * 8
    # Five tokens see 1, 2, 3, 3 and 3 keys: 2.4 on average, in scores and in sums.
    assert config.flops_per_token(32, 5) == 2 * 32 * 8 * (4 + 2 + 2 + 4) + 2 * 2 * 4 * 8 * 2.4
    assert AttentionConfig(num_heads=4).flops_per_token(32, 5) == 2 * 4 * 32 * 32 + 4 * 32 * 3
    assert config.state_bytes(32, 1) == 4 * 2 * 2 * 8 * 1 + 8
    assert config.state_bytes(32, 99) == 4 * 2 * 2 * 8 * 2 + 8


def test_names_in_transformers() -> None:
    layer = random_mixer(qk_norm=True)
    assert set(layer.hf_names()) == {name for name, _ in layer.named_parameters()}
    assert set(random_mixer().hf_names().values()) == {f"{part}_proj.weight" for part in "qkvo"}
