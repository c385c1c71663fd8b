"""The looped stack: depth, truncated backpropagation, latent states, telemetry, bad input."""

from typing import Any

import pytest
import torch
from looped_models import POISSON, looped_config
from pydantic import ValidationError
from small import model_config, random_model
from torch import Tensor
from torch.nn import functional as F

from megarec.config.stack import HaltConfig, LoopedConfig
from megarec.errors import UserError
from megarec.models import Backbone, build_model
from megarec.models.context import Context, Draw
from megarec.models.halting import Halting, LatentConfig
from megarec.models.latent import random_latent
from megarec.models.loop_metrics import token_correlation


def looped(**stack: Any) -> Backbone:
    return random_model(looped_config(**stack)).double()


def draw(step: int = 0, micro_batch: int = 0, first: int = 0, seed: int = 1) -> Draw:
    return Draw(seed, step, micro_batch, torch.arange(first, first + 2))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model: Backbone, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss, _ = model(ids, ids, **options)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {"loss": loss.detach()}


def latents(model: Backbone, ids: Tensor, num_recurrences: int) -> Tensor:
    """Return s_r, which a model without coda and last norm would show."""
    seen: list[Tensor] = []
    handle = model.blocks["3"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(ids, num_recurrences=num_recurrences)
    handle.remove()
    return seen[0]


def test_the_loop_written_out(ids: Tensor) -> None:
    model, ctx = looped(norm_core_output=True), Context()
    prelude, first, second, coda = (model.block(i) for i in range(4))
    e, _ = prelude(model.embedding(ids), ctx)
    s = random_latent(torch.arange(9).expand(2, 9), None, 16, (2 / 5) ** 0.5).double()
    for _ in range(3):
        u = model.stack.adapter(torch.cat([s, e], -1))
        s = second(first(u, ctx)[0], ctx)[0]
    z, _ = coda(model.norm(s), ctx)
    expected = F.linear(model.norm(z), model.head.weight)
    torch.testing.assert_close(model(ids, num_recurrences=3), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inject", ["add", "none"])
def test_other_injections(ids: Tensor, inject: str) -> None:
    model, ctx = looped(inject=inject, initial_state="embedding"), Context()
    e, _ = model.block(0)(model.embedding(ids), ctx)
    u = e + e if inject == "add" else e
    expected = model.block(2)(model.block(1)(u, ctx)[0], ctx)[0]
    torch.testing.assert_close(latents(model, ids, 1), expected, rtol=0, atol=1e-12)


def test_only_the_last_recurrences_are_differentiated(ids: Tensor) -> None:
    model = looped(backprop=3).train()
    found = loss_and_gradients(model, ids, num_recurrences=5)
    # The same from the state after two recurrences, as a constant.
    start = latents(model, ids, 2).detach()
    expected = loss_and_gradients(model, ids, ctx=Context(latent=start), num_recurrences=3)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)
    whole = loss_and_gradients(looped().train(), ids, num_recurrences=5)
    assert not torch.allclose(whole["stack.adapter.weight"], found["stack.adapter.weight"])


def test_more_recurrences_to_differentiate_than_there_are(ids: Tensor) -> None:
    found = loss_and_gradients(looped(backprop=8).train(), ids, num_recurrences=3)
    expected = loss_and_gradients(looped().train(), ids, num_recurrences=3)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("backprop", [None, 2])
def test_recomputing_a_recurrence_changes_no_bit(ids: Tensor, backprop: int | None) -> None:
    model = looped(backprop=backprop).train()
    expected = loss_and_gradients(model, ids)
    model.stack.recompute = True
    found = loss_and_gradients(model, ids)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_depth_is_random_in_training_alone(ids: Tensor) -> None:
    config = looped_config(depth=POISSON, backprop=2)
    model = random_model(config)
    depth = LoopedConfig.model_validate(config.stack).depth
    assert depth is not None

    def recurrences(training: bool, ctx: Context) -> float:
        model.train(training)
        counted = Halting()
        model(ids, ctx=Context(draw=ctx.draw, halting=counted))
        return counted.mean_steps

    for step in range(6):
        there = Context(draw=draw(step, micro_batch=99))
        assert recurrences(True, there) == depth.draw(1, step, 2)
        assert recurrences(False, there) == 4
    assert recurrences(True, Context()) == 4

    by_batch = random_model(looped_config(depth=POISSON | {"per": "micro_batch"})).train()
    counted = Halting()
    by_batch(ids, ctx=Context(draw=draw(step=99, micro_batch=5), halting=counted))
    assert counted.mean_steps == depth.draw(1, 5, None)


def test_latent_states_hang_on_seed_step_sample_position() -> None:
    position = torch.arange(6).expand(2, 6)
    sample = torch.tensor([3, 4])
    whole = random_latent(position, sample, 8, 1.0, 1, 2)
    assert torch.equal(random_latent(position[:1], sample[1:], 8, 1.0, 1, 2), whole[1:])
    assert torch.equal(random_latent(position[:, 4:], sample, 8, 1.0, 1, 2), whole[:, 4:])
    assert torch.equal(random_latent(position[:, 5], sample, 8, 1.0, 1, 2), whole[:, 5])
    for other in ((2, 2), (1, 3)):
        assert not torch.isclose(random_latent(position, sample, 8, 1.0, *other), whole).any()
    assert not torch.isclose(whole[0], whole[1]).any()


def test_latent_states_are_normal_and_cut() -> None:
    std = (2 / 5) ** 0.5
    x = random_latent(torch.arange(4096)[None], None, 64, std)
    assert x.dtype == torch.float32 and x.isfinite().all() and x.abs().max() <= 3 * std
    # A normal distribution cut at 3 keeps 0.9733 of its variance.
    assert x.mean().abs() < 0.01 and abs(x.var() / (0.4 * 0.9733) - 1) < 0.02
    cdf = torch.special.ndtr(x.flatten().sort().values / std)
    assert (cdf - torch.linspace(0, 1, len(cdf))).abs().max() < 0.006
    neighbours = torch.corrcoef(x[0].T)
    assert (neighbours - torch.eye(64)).abs().max() < 0.08


def test_training_draws_latent_states_by_sample(ids: Tensor) -> None:
    model = looped().train()
    same = ids[:1].expand(2, -1)
    first = model(same, ctx=Context(draw=draw(first=0)))
    assert not torch.allclose(first[0], first[1])
    shifted = model(same, ctx=Context(draw=draw(first=1)))
    torch.testing.assert_close(shifted[0], first[1], rtol=0, atol=1e-12)
    assert not torch.allclose(first, model(same, ctx=Context(draw=draw(step=1))))


def test_output_matrices_start_smaller_the_deeper_the_unrolled_stack() -> None:
    init = {"std": 0.1, "out_std": "depth", "cut": 3.0}
    config = looped_config().model_copy(update={"init": model_config(init=init).init})
    model = build_model(config)
    assert len(config.runs) == 1 + 2 * 4 + 1
    weight = torch.cat([model.block(i).ffn.down.weight.flatten() for i in range(4)])
    assert weight.std().item() == pytest.approx(0.1 / 20**0.5 * 0.9733**0.5, rel=0.05)
    assert weight.abs().max() <= 0.3 / 20**0.5


def test_telemetry(ids: Tensor) -> None:
    model = looped(num_recurrences=4).train()
    captured: dict[int, Tensor] = {}
    see = model.stack.seen.see

    def spy(i: int, n: int, old: Tensor, new: Tensor) -> None:
        see(i, n, old, new)
        new.register_hook(lambda grad: captured.__setitem__(n - i, grad))

    model.stack.seen.see = spy
    model(ids, ids)[0].backward()
    found = model.metrics()
    before, after = latents(model, ids, 3), latents(model, ids, 4)
    model.metrics()
    assert found["loop/recurrences"] == 4
    norm = after.norm(dim=-1)
    assert found["loop/state_norm"] == pytest.approx(norm.mean().item())
    residual = ((after - before).norm(dim=-1) / norm).mean().item()
    assert found["loop/residual"] == pytest.approx(residual)
    cosines = F.cosine_similarity(after[:, :, None], after[:, None], dim=-1)
    others = cosines.masked_select(~torch.eye(9, dtype=torch.bool)).mean().item()
    assert found["loop/token_correlation"] == pytest.approx(others)
    norms = {f"loop/grad_norm/{j}": captured[j].norm().item() for j in (1, 2, 4)}
    assert {k: v for k, v in found.items() if "grad_norm" in k} == pytest.approx(norms)
    assert model.metrics() == {}


def test_tokens_that_are_alike_correlate_fully() -> None:
    assert token_correlation(torch.ones(2, 5, 3)).tolist() == pytest.approx([1, 1])
    assert token_correlation(torch.eye(4)[None]).item() == pytest.approx(0)


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ({"core": 0, "prelude": 3}, "core=0: nothing would be looped"),
        ({"coda": 2}, "prelude=1 \\+ core=2 \\+ coda=2 = 5; expected num_layers=4"),
        ({"num_recurrences": 0}, "greater than or equal to 1"),
        ({"backprop": 0}, "greater than or equal to 1"),
        ({"step_signal": "learned"}, "num_step_embeddings: the number of vectors"),
        ({"halt": {"type": "kl", "threshold": -1.0}}, "greater than or equal to 0"),
        ({"halt": {"type": "act", "eps": 1.0}}, "less than 1"),
        ({"halt": {"type": "act"}, "backprop": 2}, "halt=act learns from every recurrence"),
        ({"halt": {"type": "never"}}, "unknown halting rule type 'never'"),
        ({"update": {"type": "euler", "dt": 1.5}}, "less than or equal to 1"),
        ({"cache": {"type": "modulo"}}, "slots: modulo needs a number"),
        ({"cache": {"type": "full", "slots": 2}}, "slots: modulo needs a number"),
    ],
)
def test_bad_stacks(stack: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        looped_config(**stack)


def test_depths_that_do_not_fit(ids: Tensor) -> None:
    with pytest.raises(UserError, match="num_recurrences=0: expected at least 1"):
        looped()(ids, num_recurrences=0)
    with pytest.raises(UserError, match="model.stack is not looped; leave it out"):
        random_model()(ids, num_recurrences=2)
    full, latest = looped(), looped(cache={"type": "latest"})
    with pytest.raises(UserError, match=r"holds 4 recurrences of every token \(cache: full\)"):
        full.step(ids[:, 0], full.init_state(2), num_recurrences=3)
    with pytest.raises(UserError, match="num_recurrences=6: the state holds 5 at most"):
        latest.step(ids[:, 0], latest.init_state(2, 5), num_recurrences=6)
    latest.step(ids[:, 0], latest.init_state(2, 5), num_recurrences=3)


def test_a_learned_rule_is_not_chosen_at_run_time() -> None:
    act = HaltConfig.model_validate({"type": "act"})
    with pytest.raises(ValueError, match="act is learned"):
        Halting(act)
    assert Halting(LatentConfig()).config == LatentConfig(threshold=0.03)
