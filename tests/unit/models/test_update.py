"""Update rules of a looped stack: their formulas, what they start as, and their gradients."""

import math
from typing import Any

import pytest
import torch
from looped_models import looped_config
from small import random_model
from torch import Tensor
from torch.nn import functional as F

from megarec.config.stack import UpdateConfig
from megarec.models import Backbone, build_model
from megarec.models.context import Context
from megarec.models.update import (
    EulerConfig,
    Gated,
    GatedConfig,
    Normed,
    NormedConfig,
    Update,
)

D = 5


@pytest.fixture(scope="module")
def states() -> tuple[Tensor, Tensor]:
    """Return F and s, (2, 3, D)."""
    rng = torch.Generator().manual_seed(0)
    new, old = torch.randn(2, 2, 3, D, dtype=torch.float64, generator=rng)
    return new, old


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))


def rule(config: UpdateConfig) -> Update:
    """Return a rule of D channels whose every parameter is random."""
    update = config.build(D).double()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return update


def model_with(**stack: Any) -> Backbone:
    return random_model(looped_config(**stack)).double()


def test_euler(states: tuple[Tensor, Tensor]) -> None:
    new, old = states
    for dt in (0.0, 0.25, 0.5, 1.0):
        expected = (1 - dt) * old + dt * new
        torch.testing.assert_close(rule(EulerConfig(dt=dt))(new, old), expected, rtol=0, atol=1e-15)
    assert EulerConfig().dt == 0.5
    assert torch.equal(rule(EulerConfig(dt=1))(new, old), new)
    assert torch.equal(rule(EulerConfig(dt=0))(new, old), old)


def test_a_whole_step_is_the_plain_loop_and_none_is_no_loop(ids: Tensor) -> None:
    # Rules without parameters: all of these models have the same weights.
    plain = model_with(initial_state="embedding")
    whole = model_with(initial_state="embedding", update={"type": "euler", "dt": 1.0})
    assert torch.equal(whole(ids), plain(ids))
    still = model_with(initial_state="embedding", update={"type": "euler", "dt": 0.0})
    prelude, coda = still.block(0), still.block(3)
    e, _ = prelude(still.embedding(ids), Context())
    expected = F.linear(still.norm(coda(e, Context())[0]), still.head.weight)
    torch.testing.assert_close(still(ids), expected, rtol=0, atol=1e-12)


def test_steps_towards_a_contraction_converge(states: tuple[Tensor, Tensor]) -> None:
    """The distance from the fixed point shrinks by (1 - dt) + dt L for F of slope L."""
    target, state = states
    update, slope = rule(EulerConfig(dt=0.5)), -0.9
    for _ in range(8):
        after = update(target + slope * (state - target), state)
        torch.testing.assert_close(after - target, 0.05 * (state - target))
        state = after


def test_gated(states: tuple[Tensor, Tensor]) -> None:
    new, old = states
    update = rule(GatedConfig())
    assert isinstance(update, Gated)
    weight, bias = update.gate.weight, update.gate.bias
    expected = torch.empty_like(new)
    for at in [(b, t) for b in range(2) for t in range(3)]:
        z = 1 / (1 + torch.exp(-(weight @ torch.cat([new[at], old[at]]) + bias)))
        expected[at] = z * new[at] + (1 - z) * old[at]
    torch.testing.assert_close(update(new, old), expected.detach(), rtol=0, atol=1e-14)
    inputs = (new.clone().requires_grad_(), old.clone().requires_grad_())
    assert torch.autograd.gradcheck(update, inputs)


def test_the_gate_starts_by_keeping_most_of_the_state(states: tuple[Tensor, Tensor]) -> None:
    model = build_model(looped_config(update={"type": "gated"}))
    update = model.stack.update
    assert isinstance(update, Gated)
    assert (update.gate.bias == -2).all() and 0.1 < update.gate.weight.std() < 0.25
    with torch.no_grad():
        update.gate.weight.zero_()
    new, old = torch.zeros(16), torch.ones(16)
    kept = update(new, old)
    torch.testing.assert_close(kept, torch.full((16,), 1 - 1 / (1 + math.exp(2))))
    assert kept.mean().item() == pytest.approx(0.88, abs=0.001)
    open_ = build_model(looped_config(update={"type": "gated", "bias": 1.0})).stack.update
    assert isinstance(open_, Gated) and (open_.gate.bias == 1).all()


def test_normed(states: tuple[Tensor, Tensor]) -> None:
    new, old = states
    update = rule(NormedConfig(eps=0.1))
    assert isinstance(update, Normed)
    expected = new / (new.square().mean(-1, keepdim=True) + 0.1).sqrt() * update.norm.weight
    torch.testing.assert_close(update(new, old), expected.detach(), rtol=0, atol=1e-14)
    assert torch.equal(update(new, old), update(new, -old))
    fresh = build_model(looped_config(update={"type": "normed"})).stack.update
    assert isinstance(fresh, Normed) and (fresh.norm.weight == 1).all()
