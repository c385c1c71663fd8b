"""What `NAME key=value ...` on a command line means for generation."""

from collections.abc import Sequence
from typing import cast

from megarec.cli import named_settings, validated
from megarec.config.stack import HaltConfig
from megarec.errors import UserError
from megarec.generation.diffusion_forcing import DiffusionForcingConfig
from megarec.models.halting import Halting


def parse_halting(words: Sequence[str]) -> Halting:
    """Make the halting rule of, say, `kl threshold=5e-4`.

    Raises:
        UserError: an unknown rule, one that only training can give, or bad settings.
    """
    name, settings = named_settings(words)
    rule = cast("type[HaltConfig] | None", HaltConfig.member(name))
    if rule is None or rule.learned:
        problem = "unknown rule" if rule is None else "a model's own config alone can set this rule"
        members = cast("dict[str, type[HaltConfig]]", HaltConfig.members)
        known = ", ".join(sorted(tag for tag, member in members.items() if not member.learned))
        raise UserError(f"--halt {name}: {problem}; expected one of: {known}")
    return Halting(validated(rule, settings, f"--halt {name}"))


def parse_sampler(words: Sequence[str]) -> DiffusionForcingConfig:
    """Make the sampler of, say, `diffusion_forcing inner_recurrence=2`.

    Raises:
        UserError: an unknown sampler, or bad settings.
    """
    name, settings = named_settings(words)
    if name != "diffusion_forcing":
        raise UserError(f"--sampler {name}: unknown sampler; expected diffusion_forcing")
    return validated(DiffusionForcingConfig, settings, f"--sampler {name}")
