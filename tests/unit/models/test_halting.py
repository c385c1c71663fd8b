"""Halting rules against loops over single tokens: when they stop, what comes out, what it costs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from looped_models import looped_tree
from small import model_config, random_model
from torch import Tensor
from torch.nn import functional as F

from megarec.config.stack import HaltConfig
from megarec.models import Backbone, build_model
from megarec.models.context import Context
from megarec.models.halting import (
    ACTConfig,
    ArgmaxConfig,
    EntropyConfig,
    ExitGateConfig,
    Halting,
    Iteration,
    KLConfig,
    LatentConfig,
    Unit,
)

D, STEPS = 4, 6


@pytest.fixture(scope="module")
def start() -> Tensor:
    """Return latent states of 3 x 7 tokens."""
    rng = torch.Generator().manual_seed(0)
    return 2 * torch.randn(3, 7, D, dtype=torch.float64, generator=rng)


@pytest.fixture(scope="module")
def core() -> Callable[[Tensor], Tensor]:
    """Return a core under which every token moves on its own."""
    rng = torch.Generator().manual_seed(1)
    matrix = torch.randn(D, D, dtype=torch.float64, generator=rng)
    return lambda s: torch.tanh(s @ matrix + 0.3)


def no_readout(latent: Tensor) -> Tensor:
    raise AssertionError("a learned rule reads the latent state alone")


def random_unit(config: HaltConfig, bias: float = 0.0) -> Unit:
    """Return a learned rule with random weights."""
    unit = config.build(D).double()
    assert isinstance(unit, Unit)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        unit.unit.weight.copy_(torch.randn(1, D, generator=rng, dtype=torch.float64))
        unit.unit.bias.fill_(bias)
    return unit


def run(
    iteration: Iteration, core: Callable[[Tensor], Tensor], start: Tensor, readout: Any = no_readout
) -> Tensor:
    """Iterate all tokens at once; returns the last latent state."""
    latent = start
    for _ in range(STEPS):
        latent = iteration.advance(latent, core(latent), readout)
    return latent


def probability(unit: Unit, s_D: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-(unit.unit.weight[0] @ s_D + unit.unit.bias[0])))


def act_of_one_token(
    act: Unit, eps: float, core: Callable[[Tensor], Tensor], s_D: Tensor
) -> tuple[Tensor, int, Tensor, list[Tensor]]:
    """Return output, N, R and weights of a token (arXiv 1603.08983, eq. 5 to 13)."""
    halted, output, weights = torch.zeros((), dtype=torch.float64), torch.zeros_like(s_D), []
    for n in range(1, STEPS + 1):
        s_D = core(s_D)
        p = probability(act, s_D)
        if halted + p > 1 - eps or n == STEPS:
            remainder = 1 - halted
            return output + remainder * s_D, n, remainder, [*weights, remainder]
        halted, output = halted + p, output + p * s_D
        weights.append(p)
    raise AssertionError


def test_act_token_by_token(start: Tensor, core: Callable[[Tensor], Tensor]) -> None:
    config = ACTConfig(eps=0.1, ponder_weight=0.03)
    act = random_unit(config)
    iteration = act.start()
    latent = run(iteration, core, start)
    output, penalty = iteration.output(latent), iteration.penalty()
    assert penalty is not None and iteration.num_steps is not None
    found = set()
    for at in [(b, t) for b in range(3) for t in range(7)]:
        expected, n, remainder, weights = act_of_one_token(act, 0.1, core, start[at])
        assert iteration.num_steps[at] == n and len(weights) == n
        assert sum(weights).item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(output[at], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(penalty[at], 0.03 * (n + remainder), rtol=0, atol=1e-12)
        found.add(n)
        # What has stopped stays as it is.
        stopped = start[at]
        for _ in range(n):
            stopped = core(stopped)
        torch.testing.assert_close(latent[at], stopped, rtol=0, atol=1e-12)
    # Some stop early, and some have to be stopped.
    assert len(found) >= 3 and STEPS in found


def test_the_gradients_of_act_take_the_number_of_steps_as_constant(
    start: Tensor, core: Callable[[Tensor], Tensor]
) -> None:
    act = random_unit(ACTConfig(eps=0.1, ponder_weight=0.03))
    inputs = start.clone().requires_grad_()
    leaves = (inputs, act.unit.weight, act.unit.bias)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, leaves, retain_graph=True)

    iteration = act.start()
    output = iteration.output(run(iteration, core, inputs))
    penalty = iteration.penalty()
    assert penalty is not None
    tokens = [act_of_one_token(act, 0.1, core, s) for row in inputs for s in row]
    outputs = torch.stack([token[0] for token in tokens]).view_as(output)
    # N has no gradient, R has.
    remainders = torch.stack([token[2] for token in tokens]).view_as(penalty)
    for found, expected in (
        (penalty.sum(), 0.03 * remainders.sum()),
        ((output**3).sum(), (outputs**3).sum()),
    ):
        for one, other in zip(gradients(found), gradients(expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("bias", "expected"), [(None, 1.0), (-2.0, -2.0)])
def test_what_act_starts_from(bias: float | None, expected: float) -> None:
    halt = {"type": "act"} | ({} if bias is None else {"bias": bias})
    act = build_model(model_config(**looped_tree(halt=halt))).stack.halt
    assert isinstance(act, Unit) and act.unit.bias.item() == expected
    assert 0.05 < act.unit.weight.std() < 0.3


def exit_probabilities(gate: Unit, latents: list[Tensor]) -> list[Tensor]:
    """Return p_t of one token (arXiv 2510.25741, section 3)."""
    stayed, p = torch.ones((), dtype=torch.float64), []
    for s_D in latents[:-1]:
        leaves = probability(gate, s_D)
        p.append(leaves * stayed)
        stayed = stayed * (1 - leaves)
    return [*p, stayed]


def test_the_exit_gate_gives_a_distribution(
    start: Tensor, core: Callable[[Tensor], Tensor]
) -> None:
    gate = random_unit(ExitGateConfig(entropy_weight=0.2)).train()
    iteration = gate.start()
    run(iteration, core, start)
    exits, penalty = iteration.exits(), iteration.penalty()
    assert len(exits) == STEPS and penalty is not None
    for at in [(b, t) for b in range(3) for t in range(7)]:
        latents = [core(start[at])]
        while len(latents) < STEPS:
            latents.append(core(latents[-1]))
        p = torch.stack(exit_probabilities(gate, latents))
        assert p.sum().item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(torch.stack([w[at] for _, w in exits]), p, rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.stack([s[at] for s, _ in exits]), torch.stack(latents))
        entropy = -(p * p.log()).sum()
        torch.testing.assert_close(penalty[at], -0.2 * entropy, rtol=0, atol=1e-12)


def test_a_shut_gate_has_a_gradient(start: Tensor, core: Callable[[Tensor], Tensor]) -> None:
    gate = random_unit(ExitGateConfig()).train()
    with torch.no_grad():
        gate.unit.weight.zero_()
        gate.unit.bias.fill_(-1000.0)
    iteration = gate.start()
    run(iteration, core, start)
    penalty = iteration.penalty()
    assert penalty is not None and torch.equal(penalty, torch.zeros_like(penalty))
    penalty.sum().backward()
    assert gate.unit.bias.grad is not None and gate.unit.bias.grad.isfinite().all()


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
def test_outside_of_training_tokens_leave_at_the_threshold(
    start: Tensor, core: Callable[[Tensor], Tensor], threshold: float
) -> None:
    gate = random_unit(ExitGateConfig(threshold=threshold), bias=-1.0).eval()
    iteration = gate.start()
    latent = run(iteration, core, start)
    assert iteration.exits() == [] and iteration.penalty() is None
    assert iteration.num_steps is not None
    found = set()
    for at in [(b, t) for b in range(3) for t in range(7)]:
        latents = [core(start[at])]
        left = probability(gate, latents[0])
        while left <= threshold and len(latents) < STEPS:
            latents.append(core(latents[-1]))
            left = left + (1 - left) * probability(gate, latents[-1])
        assert iteration.num_steps[at] == len(latents)
        torch.testing.assert_close(iteration.output(latent)[at], latents[-1])
        found.add(len(latents))
    expected: dict[float, Any] = {0.0: {1}, 1.0: {STEPS}}
    assert found == expected.get(threshold, found) and (threshold != 0.6 or len(found) > 2)


def loop_lm(**halt: Any) -> Backbone:
    """A model that is a loop as a whole but for its coda, with an exit gate."""
    tree = looped_tree(
        prelude=0,
        core=1,
        inject="none",
        initial_state="embedding",
        num_recurrences=4,
        update={"type": "normed"},
        halt={"type": "exit_gate"} | halt,
    )
    tree |= {"num_layers": 2, "head": {"soft_cap": 5.0, "z_loss": 0.01, "chunk_size": 7}}
    return random_model(model_config(**tree)).double()


def test_the_loss_of_an_exit_gate_written_out() -> None:
    """sum over tokens of sum_t p_t CE_t - beta H(p), and every gradient of it."""
    rng = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(61, (2, 2, 9), generator=rng)
    labels[0, 3:5] = -100
    model = loop_lm(entropy_weight=0.3).train()
    gate = model.stack.halt
    assert isinstance(gate, Unit)
    kept = labels != -100

    loss = torch.zeros((), dtype=torch.float64)
    s, stayed, entropy = model.embedding(ids), torch.ones(2, 9, dtype=torch.float64), 0.0
    for t in range(4):
        s = model.stack.update(model.block(0)(s, Context())[0], s)
        x = model.norm(model.block(1)(s, Context())[0])
        logits = 5 * torch.tanh(F.linear(x, model.head.weight) / 5)
        losses = F.cross_entropy(logits.mT, labels, reduction="none")
        losses = losses + 0.01 * logits.logsumexp(-1).square()
        leaves = torch.sigmoid(F.linear(s, gate.unit.weight, gate.unit.bias))[..., 0]
        p = stayed if t == 3 else stayed * leaves
        stayed = stayed * (1 - leaves)
        loss = loss + (p * losses)[kept].sum()
        entropy = entropy - p * p.log()
    loss = loss - 0.3 * entropy[kept].sum()

    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(loss, list(parameters.values()))
    found, count = model(ids, labels)
    assert count == 16
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(found, list(parameters.values()))
    for name, one, other in zip(parameters, gradients, expected, strict=True):
        assert other.abs().max() > 0, name
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)


def test_outside_of_training_the_last_state_alone_is_read() -> None:
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    model = loop_lm().eval()
    loss, _ = model(ids, ids)
    expected = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_the_ponder_cost_is_part_of_the_loss_in_training_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(61, (2, 2, 9), generator=rng)
    labels[0, 3:5] = -100
    losses = {}
    for weight in (0.0, 0.5):
        halt = {"type": "act", "bias": -1.0, "ponder_weight": weight}
        tree = looped_tree(inject="add", initial_state="zero", halt=halt)
        model = random_model(model_config(**tree)).double()
        losses[weight] = [model.train(training)(ids, labels)[0] for training in (True, False)]
    (plain, read), (pondering, same) = losses[0.0], losses[0.5]
    assert read == same == plain
    # 16 tokens count: each iterates 1 to 4 times, and has a rest between 0 and 1.
    assert 0.5 * 16 < pondering - plain < 0.5 * 16 * 5


READOUT = torch.tensor([[2.0, -1.0, 0.5, 1.0], [0.5, 2.0, -1.0, 0.0], [-1.0, 0.3, 2.0, 1.0]])


def readout(latent: Tensor) -> Tensor:
    return latent @ READOUT.T.double()


def kl(p: Tensor, q: Tensor) -> float:
    return (p * (p / q).log()).sum().item()


def entropy(p: Tensor) -> float:
    return -(p * p.log()).sum().item()


def first_stop(config: HaltConfig, latents: list[Tensor]) -> int:
    """Return how often a token iterates whose latent states, s_0 first, are these."""
    p = [readout(s).softmax(-1) for s in latents]
    uniform = torch.full_like(p[0], 1 / len(p[0]))
    best = [int(x.argmax()) for x in p]
    for t in range(1, len(latents)):
        old, new = latents[t - 1], latents[t]
        if isinstance(config, LatentConfig):
            stops = ((new - old).norm() / new.norm()).item() < config.threshold
        elif isinstance(config, EntropyConfig):
            stops = t > 1 and abs(entropy(p[t]) - entropy(p[t - 1])) < config.threshold
        elif isinstance(config, KLConfig):
            stops = kl(p[t - 1] if t > 1 else uniform, p[t]) < config.threshold
        else:
            assert isinstance(config, ArgmaxConfig)
            window = best[max(t - config.patience + 1, 1) : t + 1]
            stops = len(window) == config.patience and len(set(window)) == 1
        if stops:
            return t
    return len(latents) - 1


@pytest.mark.parametrize(
    "config",
    [
        LatentConfig(threshold=0.3),
        EntropyConfig(threshold=0.03),
        KLConfig(threshold=0.1),
        ArgmaxConfig(patience=2),
        ArgmaxConfig(patience=3),
    ],
    ids=lambda config: f"{config.type} {getattr(config, 'threshold', '')}",
)
def test_rules_that_watch_token_by_token(
    start: Tensor, core: Callable[[Tensor], Tensor], config: HaltConfig
) -> None:
    iteration = config.build(D).start()
    latent = run(iteration, core, start, readout)
    assert iteration.num_steps is not None and iteration.penalty() is None
    found = set()
    for at in [(b, t) for b in range(3) for t in range(7)]:
        latents = [start[at]]
        for _ in range(STEPS):
            latents.append(core(latents[-1]))
        steps = first_stop(config, latents)
        assert iteration.num_steps[at] == steps
        torch.testing.assert_close(iteration.output(latent)[at], latents[steps])
        found.add(steps)
    assert len(found) >= 3


@pytest.mark.parametrize("config", [LatentConfig, EntropyConfig, KLConfig])
def test_a_threshold_of_zero_stops_nothing(
    start: Tensor, core: Callable[[Tensor], Tensor], config: type[HaltConfig]
) -> None:
    iteration = config.model_validate({"threshold": 0.0}).build(D).start()
    run(iteration, core, start, readout)
    assert iteration.num_steps is not None and (iteration.num_steps == STEPS).all()


def test_mean_steps() -> None:
    halting = Halting()
    assert math.isnan(halting.mean_steps)
    halting.count(torch.tensor([[1, 2], [3, 4]]))
    halting.count(torch.tensor([5]))
    assert (halting.num_tokens, halting.num_steps, halting.mean_steps) == (5, 15, 3.0)
