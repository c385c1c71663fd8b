"""Halting rules and samplers, as they are named on a command line."""

import pytest

from megarec.errors import UserError
from megarec.generation import DiffusionForcingConfig
from megarec.generation.options import parse_halting, parse_sampler
from megarec.models.halting import ArgmaxConfig, KLConfig


def test_names_and_settings() -> None:
    assert parse_halting(["kl"]).config == KLConfig()
    assert parse_halting(["kl", "threshold=5e-3"]).config == KLConfig(threshold=0.005)
    assert parse_halting(["argmax", "patience=2"]).config == ArgmaxConfig(patience=2)
    sampler = parse_sampler(["diffusion_forcing", "inner_recurrence=2", "freeze=fixed"])
    assert sampler == DiffusionForcingConfig(inner_recurrence=2, freeze="fixed")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("never", "--halt never: unknown rule; expected one of: argmax, entropy, kl, latent"),
        ("act", "--halt act: a model's own config alone can set this rule; expected one of: argm"),
        ("kl threshold=-1", "--halt kl: threshold=-1: Input should be greater than or equal to 0"),
        ("kl treshold=1", "--halt kl: treshold=1: unknown key; did you mean 'threshold'?"),
        ("kl threshold", "override 'threshold': expected key=value"),
        ("argmax patience=0", "--halt argmax: patience=0: Input should be greater than or equal"),
    ],
)
def test_bad_rules(words: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_halting(words.split())
    assert str(caught.value).startswith(message) and len(caught.value.lines) == 1


def test_bad_samplers() -> None:
    with pytest.raises(UserError, match="--sampler x: unknown sampler; expected diffusion_forcing"):
        parse_sampler(["x"])
    with pytest.raises(UserError) as caught:
        parse_sampler(["diffusion_forcing", "ema_embeds=2", "freeze=never", "headway=0"])
    assert len(caught.value.lines) == 3
