"""ELLISAdam: Huginn's own trajectory, a scalar reference, and resuming."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import random_model
from torch import Tensor, nn

from megarec.checkpoint import dcp
from megarec.config.schema import OptimizerConfig
from megarec.optim.build import build_optimizer, set_learning_rate
from megarec.optim.ellis_adam import ELLISAdam

GOLDEN = Path(__file__).parents[2] / "golden/recurrent_depth/e_ellisadam.npz"
LR = 4e-2


def warm_up(step: int) -> float:
    return LR * min(1, (step + 1) / 3)


def test_golden_trajectory() -> None:
    with np.load(GOLDEN) as arrays:
        golden = {key: torch.from_numpy(arrays[key]) for key in arrays}
    p, q = (nn.Parameter(golden[key].clone()) for key in ("P0", "Q0"))
    optimizer = ELLISAdam([{"params": [p], "weight_decay": 4e-3}, {"params": [q]}], lr=LR)
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = warm_up(step)
        p.grad, q.grad = golden[f"gP{step}"], golden[f"gQ{step}"]
        optimizer.step()
        torch.testing.assert_close(p.data, golden[f"P{step + 1}"], rtol=0, atol=1e-6)
        torch.testing.assert_close(q.data, golden[f"Q{step + 1}"], rtol=0, atol=1e-6)


class ScalarReference:
    """One tensor, a number at a time."""

    def __init__(self, values: list[float], decay: float, peak: float) -> None:
        self.p, self.decay, self.peak, self.t = values, decay, peak, 0

    def step(self, gradient: list[float], lr: float, betas: tuple[float, float], eps: float):
        if self.t == 0:
            self.m = list(gradient)
            self.v = [g * g for g in gradient]
        self.t += 1
        total = 0.0
        for i, g in enumerate(gradient):
            self.m[i] = betas[0] * self.m[i] + (1 - betas[0]) * g
            self.v[i] = betas[1] * self.v[i] + (1 - betas[1]) * g * g
            total += g * g / max(self.v[i], eps * eps)
        size = lr / max(1.0, math.sqrt(total / len(gradient))) / (1 - betas[0] ** self.t)
        for i in range(len(self.p)):
            root = math.sqrt(self.v[i]) / math.sqrt(1 - betas[1] ** self.t)
            self.p[i] *= 1 - lr / self.peak * self.decay
            self.p[i] -= size * math.atan2(self.m[i], root)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_scalar_reference(dtype: torch.dtype, tolerance: float) -> None:
    """Also of: a late first gradient, one that is missing, zeros, tiny ones, and a spike."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (4, 3), "vector": (5,), "scalar": (), "late": (2, 2), "still": (3,)}
    betas, eps = (0.8, 0.9), 1e-3
    decays = {"matrix": 0.02, "late": 0.02}
    parameters, references = {}, {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        parameters[name] = nn.Parameter(values.to(dtype))
        peak = 2 * LR if name in decays else LR
        references[name] = ScalarReference(values.flatten().tolist(), decays.get(name, 0.0), peak)
    optimizer = ELLISAdam(
        [
            {"params": [parameters[n] for n in decays], "weight_decay": 0.02, "lr": 2 * LR},
            {"params": [parameters[n] for n in shapes if n not in decays]},
        ],
        lr=LR,
        betas=betas,
        eps=eps,
    )
    for step in range(12):
        for group, factor in zip(optimizer.param_groups, (2, 1), strict=True):
            group["lr"] = factor * warm_up(step)
        for name, parameter in parameters.items():
            parameter.grad = None
            if (name == "late" and step < 4) or (name == "matrix" and step == 6):
                continue
            g = torch.randn(shapes[name], generator=generator)
            g *= {"vector": 1e-3, "still": 0.0}.get(name, 1.0) * (30.0 if step == 8 else 1.0)
            parameter.grad = g.to(dtype)
            lr = warm_up(step) * (2 if name in decays else 1)
            references[name].step(g.flatten().tolist(), lr, betas, eps)
        optimizer.step()
    for name, parameter in parameters.items():
        actual = parameter.detach().flatten().to(torch.float64)
        expected = torch.tensor(references[name].p, dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
        assert optimizer.state[parameter]["step"] == references[name].t


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> dict[str, Tensor]:
    """Train on random gradients; the head gets its first one at step 4, the embedding none."""
    for step in steps:
        set_learning_rate(optimizer, warm_up(step))
        generator = torch.Generator().manual_seed(step)
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            idle = name.startswith("embedding.") or (name.startswith("head.") and step < 4)
            parameter.grad = None if idle else gradient
        optimizer.step()
    return dcp.training_tensors(model, optimizer)


def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    config = OptimizerConfig(type="ellis_adam", lr=LR, weight_decay=0.01)
    model = random_model(seed=seed)
    return model, build_optimizer(model, config)


@pytest.mark.parametrize("saved_at", [0, 1, 3, 5])
def test_resuming_is_bitwise(saved_at: int, tmp_path: Path) -> None:
    expected = run(*build(0), range(7))
    dcp.write(tmp_path, run(*build(0), range(saved_at)))
    model, optimizer = build(1)
    dcp.read(tmp_path, dcp.training_tensors(model, optimizer))
    actual = run(model, optimizer, range(saved_at, 7))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    assert actual["optimizer.head.weight.step"] == 3
    assert actual["optimizer.embedding.weight.step"] == 0


def test_weight_decay_follows_the_schedule_and_not_the_factor() -> None:
    """Without gradients' pull, weights shrink by 1 - wd at the peak, whatever lr and factor."""
    options: dict[str, Any] = {"type": "ellis_adam", "weight_decay": 0.25}
    for lr, lr_scale in ((1e-3, {}), (7.0, {}), (1e-3, {"blocks.0.*": 0.5})):
        config = OptimizerConfig(lr=lr, lr_scale=lr_scale, **options)
        model = random_model()
        optimizer = build_optimizer(model, config)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for part in (1.0, 0.5):
            set_learning_rate(optimizer, part * lr)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        name = "blocks.0.ffn.up.weight"
        after = dict(model.named_parameters())
        torch.testing.assert_close(after[name].data, before[name] * 0.75 * 0.875)
        assert torch.equal(after["norm.weight"], before["norm.weight"])
