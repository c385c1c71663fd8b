"""Tokens that stop: every rule against a scalar loop, in sequences and in decoding."""

from functools import partial
from typing import Any

import pytest
import torch
from looped_models import looped_config
from looped_reference import Decoded, Rule, every
from small import random_model
from torch import Tensor

from megarec.config.stack import HaltConfig
from megarec.errors import UserError
from megarec.models import Backbone
from megarec.models.context import Context
from megarec.models.halting import Halting

RULES: dict[str, dict[str, Any]] = {
    "latent": {"threshold": 0.4},
    "entropy": {"threshold": 0.3},
    "kl": {"threshold": 0.5},
    "argmax": {"patience": 2},
    "act": {"bias": -1.0, "eps": 0.1},
    "exit_gate": {"threshold": 0.7},
}
READ_OUT = {"entropy", "kl", "argmax"}
"""Rules that look at the prediction."""

DEPTH = 6


class Recorded(Halting):
    """Remembers how often each token has iterated."""

    def __init__(self, config: HaltConfig | None = None) -> None:
        super().__init__(config)
        self.steps: list[Tensor] = []

    def count(self, num_steps: Tensor) -> None:
        super().count(num_steps)
        self.steps.append(num_steps)


def config_of(rule: str) -> HaltConfig:
    return HaltConfig.model_validate({"type": rule, **RULES[rule]})


def model_of(rule: str, **stack: Any) -> Backbone:
    """Return a model; a learned rule is its own."""
    config = config_of(rule)
    own = {"halt": {"type": rule, **RULES[rule]}} if config.learned else {}
    return random_model(looped_config(num_recurrences=DEPTH, **stack, **own)).double()


def recorder(rule: str) -> Recorded:
    config = config_of(rule)
    return Recorded(None if config.learned else config)


def reference_rule(model: Backbone, rule: str) -> Rule:
    options = {key: value for key, value in RULES[rule].items() if key in ("threshold", "patience")}
    if rule == "act":
        options["threshold"] = 1 - RULES[rule]["eps"]
    unit = model.stack.halt.unit if model.stack.halt is not None else None
    return Rule(rule, unit=unit, **options)


def run_steps(model: Backbone, ids: Tensor, halting: Halting | None) -> Tensor:
    state, rows = model.init_state(len(ids)), []
    for ids_B in ids.unbind(1):
        logits_BV, state = model.step(ids_B, state, ctx=Context(halting=halting))
        rows.append(logits_BV)
    return torch.stack(rows, 1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("parts", [{"prelude": 2, "coda": 0}, {"norm_core_output": True}])
@pytest.mark.parametrize("rule", RULES)
def test_a_sequence_equals_steps_equals_a_scalar_loop(
    rule: str, parts: dict[str, Any], ids: Tensor
) -> None:
    model = model_of(rule, **parts)
    in_steps, in_sequence = recorder(rule), recorder(rule)
    logits = run_steps(model, ids, in_steps)
    steps = torch.stack(in_steps.steps, 1)
    for row, row_ids in enumerate(ids.tolist()):
        make = partial(reference_rule, model, rule)
        expected = Decoded(model, row_ids, [DEPTH] * 9, every, make, copies=True)
        assert steps[row].tolist() == expected.steps
        close(logits[row], expected.logits_TV)
    assert steps.unique().numel() > 2 and in_steps.mean_steps == steps.double().mean()
    # A coda that mixes tokens shows a token the others as they are by then: in steps, finished.
    if not (rule in READ_OUT and model.stack.coda):
        close(model(ids, ctx=Context(halting=in_sequence)), logits)
        assert torch.equal(in_sequence.steps[0], steps)


def test_a_rule_does_not_replace_one_that_was_learned(ids: Tensor) -> None:
    with pytest.raises(UserError, match="halting=kl: the model has learned when to stop .*act"):
        model_of("act")(ids, ctx=Context(halting=Halting(config_of("kl"))))
    with pytest.raises(UserError, match="halting: model.stack is not looped; leave it out"):
        random_model()(ids, ctx=Context(halting=Halting(config_of("kl"))))
