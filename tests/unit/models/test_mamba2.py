"""The Mamba-2 mixer against its equations in float64; its initial weights, decay and clamps."""

import math
from typing import Any

import pytest
import torch
from small import model_config, random_model
from torch import Tensor
from torch.nn import functional as F

from megarec.config.model import ModelConfig
from megarec.models import build_model
from megarec.models.context import Context
from megarec.models.mixers.mamba2 import Mamba2, Mamba2Config
from megarec.optim.build import is_decayed


def config(d_model: int = 24, num_layers: int = 1, **mixer: Any) -> ModelConfig:
    sizes = {"num_heads": 4, "head_dim": 6, "state_dim": 5, "num_groups": 2, "chunk_size": 4}
    mixer = {"type": "mamba2"} | sizes | mixer
    return model_config(
        d_model=d_model, num_layers=num_layers, blocks={"m": {"mixer": mixer}}, pattern="m"
    )


def random_mixer(**mixer: Any) -> Mamba2:
    return random_model(config(**mixer)).double().blocks["0"].mixer


def inputs(*shape: int) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def naive(mixer: Mamba2, u_TD: Tensor) -> Tensor:
    """One row, token by token and head by head, from the equations of arXiv 2405.21060.

    [z|x|B|C|dt] = W_in u; [x|B|C] <- silu(conv([x|B|C]) + b); dt <- clamp(softplus(dt + bias));
    S_t = exp(-dt exp(A_log)) S_{t-1} + dt x_t B_t^T; y_t = S_t C_t + D x_t;
    out = W_out (norm(y silu(z)) w), the norm over each group's share of the channels.
    """
    c = mixer.config
    H, P, G, N, K = c.num_heads, c.head_dim, c.num_groups, c.state_dim, c.conv_kernel
    parameters = {name: p.double() for name, p in mixer.named_parameters()}
    in_proj = torch.cat([parameters[f"{part}.weight"] for part in ("z", "x", "B", "C", "dt")])
    conv = torch.cat([parameters[f"conv.{part}.weight"] for part in "xBC"])[:, 0]
    bias = torch.zeros(len(conv)).double()
    if c.conv_bias:
        bias = torch.cat([parameters[f"conv.{part}.bias"] for part in "xBC"])
    z, xBC, dt = (u_TD @ in_proj.T).split([H * P, H * P + 2 * G * N, H], -1)
    dt = torch.log1p(torch.exp(dt + parameters["dynamics.dt_bias"])).clamp(*c.dt_limit)
    S = torch.zeros(H, P, N).double()
    outs = []
    for t in range(len(u_TD)):
        convolved = bias.clone()
        for j in range(min(K, t + 1)):
            convolved = convolved + conv[:, K - 1 - j] * xBC[t - j]
        x, B, C = (convolved * convolved.sigmoid()).split([H * P, G * N, G * N])
        y = torch.zeros(H, P).double()
        for h in range(H):
            g = h // (H // G)
            x_P, B_N, C_N = x.view(H, P)[h], B.view(G, N)[g], C.view(G, N)[g]
            decay = torch.exp(-dt[t, h] * torch.exp(parameters["dynamics.A_log"][h]))
            S[h] = decay * S[h] + dt[t, h] * torch.outer(x_P, B_N)
            y[h] = S[h] @ C_N + parameters["dynamics.D"][h] * x_P
        gated = (y.flatten() * z[t] * z[t].sigmoid()).view(G, -1)
        normed = gated / (gated.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
        outs.append(parameters["out_proj.weight"] @ (normed.flatten() * parameters["norm.weight"]))
    return torch.stack(outs)


@pytest.mark.parametrize(
    "mixer",
    [
        {},
        {"num_groups": 1},
        {"num_groups": 4},
        {"num_heads": 1, "num_groups": 1, "head_dim": 1, "state_dim": 1},
        {"conv_kernel": 1},
        {"conv_kernel": 6, "conv_bias": False},
        {"dt_limit": [0.3, 0.9]},
        {"chunk_size": 64, "norm_eps": 0.1},
    ],
    ids=lambda mixer: ", ".join(f"{key} {value}" for key, value in mixer.items()) or "groups",
)
def test_equals_the_equations(mixer: dict[str, Any]) -> None:
    layer = random_mixer(**mixer)
    u_BTD = inputs(2, 11, 24)
    expected = torch.stack([naive(layer, u_TD) for u_TD in u_BTD])
    y_BTD, _ = layer(u_BTD, Context())
    torch.testing.assert_close(y_BTD, expected, rtol=1e-10, atol=1e-12)
    single, _ = layer.float()(u_BTD.float(), Context())
    error = (single.double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_the_state_is_transformers_transposed() -> None:
    """The last memory, as other implementations keep it: sum_s (decay from s) dt_s x_s B_s^T."""
    layer = random_mixer(conv_kernel=1, num_heads=1, num_groups=1)
    u_BTD = inputs(1, 2, 24)
    _, state = layer(u_BTD, Context())
    cell, _, _ = layer.project(u_BTD, None, None)
    x_TP, B_TN = cell["v"][0, :, 0], cell["k"][0, :, 0]
    dt_T, decay = cell["log_i"].exp().flatten(), cell["log_f"].exp()[0, 1, 0]
    S_PN = decay * dt_T[0] * torch.outer(x_TP[0], B_TN[0]) + dt_T[1] * torch.outer(x_TP[1], B_TN[1])
    torch.testing.assert_close(state["C"][0, 0], S_PN.mT, rtol=1e-12, atol=1e-12)


def test_the_initial_weights_of_the_papers_code() -> None:
    wide = config(d_model=256, num_heads=512, head_dim=2, state_dim=64, num_groups=4, num_layers=3)
    layer = build_model(wide, seed=3).blocks["1"].mixer
    assert all(p.dtype == torch.float32 for p in layer.parameters())

    # dt is log-uniform in [1e-3, 1e-1], A uniform in [1, 16]: compare the quartiles of 512 heads.
    quartiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    dt = F.softplus(layer.dynamics.dt_bias).log()
    expected = math.log(1e-3) + quartiles * math.log(100)
    torch.testing.assert_close(dt.quantile(quartiles), expected, rtol=0, atol=0.35)
    A = layer.dynamics.A_log.exp()
    torch.testing.assert_close(A.quantile(quartiles), 1 + 15 * quartiles, rtol=0, atol=1.2)
    assert A.min() >= 1 and A.max() <= 16
    # They are drawn apart from each other.
    assert torch.corrcoef(torch.stack([dt, A]))[0, 1].abs() < 0.2
    assert (layer.dynamics.D == 1).all() and (layer.norm.weight == 1).all()

    # nn.Conv1d's default, kaiming-uniform with a = sqrt(5): U(-1/sqrt(K), 1/sqrt(K)), K = 4.
    for conv in layer.conv.values():
        for parameter in (conv.weight, conv.bias):
            assert parameter.abs().max() <= 0.5
            assert parameter.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.1)

    small, wang = (2 / (5 * 256)) ** 0.5, 2 / 3 / 256**0.5
    for linear in (layer.z, layer.x, layer.B, layer.C, layer.dt):
        assert linear.weight.std().item() == pytest.approx(small, rel=0.02)
        assert linear.bias is None
    assert layer.out_proj.weight.std().item() == pytest.approx(wang, rel=0.02)


def test_initial_step_sizes_have_a_floor() -> None:
    floored = config(num_heads=64, dt_init=[1e-6, 1e-2], dt_init_floor=1e-3)
    dt = F.softplus(build_model(floored).blocks["0"].mixer.dynamics.dt_bias)
    assert dt.min().item() == pytest.approx(1e-3, rel=1e-3)
    # log-uniform: three quarters of [1e-6, 1e-2] lie below the floor.
    assert (dt < 1.001e-3).float().mean().item() == pytest.approx(0.75, abs=0.15)
    assert dt.max() < 1e-2


def test_which_parameters_decay() -> None:
    model = build_model(config())
    decayed = {n for n, p in model.named_parameters() if is_decayed(n, p)}
    matrices = [f"{part}.weight" for part in ("z", "x", "B", "C", "dt", "out_proj")]
    matrices += [f"conv.{part}.weight" for part in "xBC"]
    assert decayed == {f"blocks.0.mixer.{name}" for name in matrices} | {"head.weight"}


def test_recurrence_parameters_keep_float32() -> None:
    model = build_model(config())
    (module,) = model.blocks["0"].float32_modules()
    assert {name for name, _ in module.named_parameters()} == {"A_log", "dt_bias", "D"}


def test_step_sizes_stay_within_their_limits() -> None:
    limited, free = random_mixer(dt_limit=[0.2, 0.5]), random_mixer()
    u_BTD = inputs(1, 30, 24)
    cell, _, _ = limited.project(u_BTD, None, None)
    dt = free.project(u_BTD, None, None)[0]["log_i"].exp()
    assert (dt < 0.2).any() and (dt > 0.5).any()
    torch.testing.assert_close(cell["log_i"].exp(), dt.clamp(0.2, 0.5))
    rate = limited.dynamics.A_log.exp()
    torch.testing.assert_close(cell["log_f"], -dt.clamp(0.2, 0.5) * rate)
    # Outside of the limits a step size does not change with its pre-activation.
    (gradient,) = torch.autograd.grad(
        cell["log_i"].masked_fill((dt > 0.2) & (dt < 0.5), 0).sum(), limited.dynamics.dt_bias
    )
    assert not gradient.any()


@pytest.mark.parametrize("bias", [-20.0, -87.0, -88.5, -95.0, -104.0, -1e4, 50.0])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_extreme_step_sizes_stay_finite(bias: float, compute: str) -> None:
    """At -104 softplus underflows to 0 in float32, whose log is not finite."""
    model = random_model(config(num_layers=2)).train()
    with torch.no_grad():
        for block in model.blocks.values():
            block.mixer.dynamics.dt_bias[::2] = bias
    if compute == "bfloat16":
        model.bfloat16()
        for block in model.blocks.values():
            block.mixer.dynamics.float()
    ids = torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(0))
    ctx = Context.from_doc_ids(torch.tensor([[0] * 6 + [1] * 7] * 2))
    loss, _ = model(ids, labels=ids.roll(-1, 1), ctx=ctx)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    # A step of next to no size neither adds nor forgets.
    if bias < -80 and compute == "float32":
        exact = model.double()
        exact_loss, _ = exact(ids, labels=ids.roll(-1, 1), ctx=ctx)
        torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=0)


def test_gradients_equal_those_of_the_sequential_form(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(1))
    ctx = Context.from_doc_ids(torch.tensor([[0] * 10 + [1] * 11, [0] * 3 + [1] * 5 + [2] * 13]))

    def gradients(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        monkeypatch.setenv("MEGAREC_KERNELS", backend)
        model = random_model(config(num_layers=2)).to(dtype).train()
        model(ids, labels=ids.roll(-1, 1), ctx=ctx)[0].backward()
        return {name: p.grad.double() for name, p in model.named_parameters()}

    expected = gradients("reference", torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        for name, gradient in gradients("eager", dtype).items():
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < tolerance, (name, dtype, error)


def test_what_it_declares_covers_every_parameter() -> None:
    layer = random_mixer()
    names = {name for name, _ in layer.named_parameters()}
    assert set(layer.hf_names()) == names
    # Joined in the order of transformers' in_proj and conv1d.
    joined = [name for name, leaf in layer.hf_names().items() if leaf == "in_proj.weight"]
    assert joined == [f"{part}.weight" for part in ("z", "x", "B", "C", "dt")]
    joined = [name for name, leaf in layer.hf_names().items() if leaf == "conv1d.weight"]
    assert joined == [f"conv.{part}.weight" for part in "xBC"]
    assert "conv1d.bias" not in random_mixer(conv_bias=False).hf_names().values()


def test_count_of_parameters_by_hand() -> None:
    config = Mamba2Config(num_heads=4, head_dim=6, state_dim=5, num_groups=2)
    in_proj = 24 * (2 * 24 + 2 * 2 * 5 + 4)
    conv = (24 + 2 * 2 * 5) * (4 + 1)
    assert config.num_params(24) == in_proj + conv + 3 * 4 + 24 + 24 * 24
