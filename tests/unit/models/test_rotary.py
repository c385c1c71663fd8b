"""Rotary positions: turns computed by hand, partial heads, and the scalings' formulas."""

import math

import pytest
import torch
from megarec_kernels.rotary import rotary

from megarec.models.rotary import (
    Llama3Scaling,
    RotaryConfig,
    YarnScaling,
    rotation,
)


def frequencies(config: RotaryConfig, head_dim: int) -> torch.Tensor:
    """Return the turn of each pair per token, in radians."""
    cos, sin = rotation(config, head_dim, torch.ones(1, dtype=torch.int64), torch.float64)
    return torch.atan2(sin, cos).flatten()


def test_two_pairs_by_hand() -> None:
    """A head of 4: dimensions 0 and 2 turn by p, 1 and 3 by p / 10 (base 100)."""
    turn = rotation(RotaryConfig(base=100.0), 4, torch.tensor([[0, 3]]), torch.float64)
    assert turn.shape == (2, 1, 2, 1, 2)
    x = torch.tensor([1.0, 2.0, 5.0, 7.0], dtype=torch.float64)
    first, second = rotary(x.expand(1, 2, 1, 4), turn)[0, :, 0]
    assert torch.equal(first, x)
    c, s, c10, s10 = math.cos(3), math.sin(3), math.cos(0.3), math.sin(0.3)
    by_hand = [c - 5 * s, 2 * c10 - 7 * s10, 5 * c + s, 7 * c10 + 2 * s10]
    torch.testing.assert_close(second, torch.tensor(by_hand, dtype=torch.float64))


def test_scores_depend_on_the_distance_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=rng, dtype=torch.float64)

    def score(at_q: int, at_k: int) -> torch.Tensor:
        turns = (rotation(RotaryConfig(), 8, torch.tensor([[p]]), q.dtype) for p in (at_q, at_k))
        return (rotary(q, next(turns)) * rotary(k, next(turns))).sum()

    torch.testing.assert_close(score(9, 4), score(1005, 1000))
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3


def test_a_fraction_of_the_head_turns() -> None:
    config = RotaryConfig(fraction=0.5)
    assert config.size(8) == 4
    position = torch.tensor([[7]])
    x = torch.arange(8.0).view(1, 1, 1, 8)
    turned = rotary(x, rotation(config, 8, position, x.dtype))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    # The first half turns as a whole head of its size does.
    alone = rotary(x[..., :4], rotation(RotaryConfig(), 4, position, x.dtype))
    assert torch.equal(turned[..., :4], alone)


def test_heads_that_do_not_turn_in_pairs() -> None:
    (line,) = RotaryConfig(fraction=0.5).problems(6)
    assert "head_dim=6 x 0.5 gives 3 rotary dimensions" in line and "even" in line
    (line,) = RotaryConfig(fraction=0.1).problems(6)
    assert "gives 0 rotary dimensions" in line
    assert RotaryConfig(fraction=0.5).problems(8) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_angles_are_not_computed_in_bfloat16(dtype: torch.dtype) -> None:
    position = torch.tensor([[1001]])
    turn = rotation(RotaryConfig(), 4, position, dtype)
    assert turn.dtype == torch.promote_types(dtype, torch.float32)
    exact = torch.tensor([math.cos(1001), math.cos(10.01), math.sin(1001), math.sin(10.01)])
    torch.testing.assert_close(turn.flatten().float(), exact, rtol=0, atol=1e-4)
    x = torch.ones(1, 1, 1, 4, dtype=dtype)
    assert rotary(x, turn).dtype == dtype


def test_linear_scaling_divides() -> None:
    plain = frequencies(RotaryConfig(base=500.0), 8)
    torch.testing.assert_close(plain, 500.0 ** -(torch.arange(4).double() / 4))
    scaled = RotaryConfig.model_validate(
        {"base": 500.0, "scaling": {"type": "linear", "factor": 4.0}}
    )
    torch.testing.assert_close(frequencies(scaled, 8), plain / 4)


def test_llama3_scaling_by_wavelength() -> None:
    """Llama 3.1: factor 8, low 1, high 4, trained on 8,192 tokens, base 500,000, heads of 128."""
    scaling = Llama3Scaling(factor=8.0, original_max_seq_len=8192)
    config = RotaryConfig(base=500_000.0, scaling=scaling)
    plain = frequencies(RotaryConfig(base=500_000.0), 128)
    kept = stretched = blended = 0
    for new, old in zip(frequencies(config, 128).tolist(), plain.tolist(), strict=True):
        wavelength = 2 * math.pi / old
        if wavelength < 8192 / 4:
            kept += 1
            expected = old
        elif wavelength > 8192 / 1:
            stretched += 1
            expected = old / 8
        else:
            blended += 1
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * old / 8 + smooth * old
        assert new == pytest.approx(expected, rel=1e-9)
    assert (kept, blended, stretched) == (29, 6, 29)


def test_yarn_by_turns() -> None:
    """A ramp over the pairs, from 32 turns in 2,048 tokens (kept) to 1 (divided by 16)."""
    scaling = YarnScaling(factor=16.0, original_max_seq_len=2048)
    config = RotaryConfig(scaling=scaling)
    plain = frequencies(RotaryConfig(), 64)

    def pair(turns: float) -> float:
        """Solve 2048 * 10000^(-r / 32) = 2 pi turns for the pair r."""
        return 32 * math.log(2048 / (2 * math.pi * turns)) / math.log(10_000)

    low, high = math.floor(pair(32)), math.ceil(pair(1))
    assert (low, high) == (8, 21)
    for r, (new, old) in enumerate(zip(frequencies(config, 64), plain, strict=True)):
        slow = min(max((r - low) / (high - low), 0), 1)
        assert new.item() == pytest.approx((old * (1 - slow) + old / 16 * slow).item(), rel=1e-9)


def test_yarn_enlarges_cos_and_sin() -> None:
    position = torch.tensor([5])
    plain = rotation(RotaryConfig(), 4, position, torch.float64)
    for given, expected in ((None, 0.1 * math.log(16) + 1), (1.5, 1.5)):
        scaling = YarnScaling(factor=16.0, attention_factor=given, original_max_seq_len=10**9)
        # Trained on so many tokens that no pair is slow: only the magnitude differs.
        turn = rotation(RotaryConfig(scaling=scaling), 4, position, torch.float64)
        torch.testing.assert_close(turn, plain * expected)
    assert YarnScaling(factor=0.5, original_max_seq_len=64).magnitude() == 1.0
