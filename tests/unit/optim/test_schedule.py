"""Learning-rate schedules against their formulas."""

import math

import pytest

from megarec.config.schema import ScheduleConfig
from megarec.optim.schedule import learning_rate


def schedule(kind: str, **changes: float) -> list[float]:
    values = {"type": kind, "warmup_steps": 10, "cooldown_steps": 20, "final_lr_ratio": 0.1}
    config = ScheduleConfig.model_validate(values | changes)
    return [learning_rate(config, 2.0, step, 100) for step in range(100)]


@pytest.mark.parametrize("kind", ["cosine", "exponential", "wsd", "constant"])
def test_warm_up_and_cool_down_are_linear(kind: str) -> None:
    lr = schedule(kind)
    assert lr[:11] == pytest.approx([0.2 * step for step in range(11)])
    end_of_decay = 2.0 if kind in ("wsd", "constant") else 0.2
    assert lr[80] == pytest.approx(end_of_decay)
    assert lr[80:] == pytest.approx([end_of_decay * (100 - t) / 20 for t in range(80, 100)])


def test_decay_between_them() -> None:
    assert schedule("exponential")[45] == pytest.approx(2.0 * 0.1**0.5)
    assert schedule("cosine")[45] == pytest.approx(2.0 * 0.55)
    assert schedule("constant")[10:80] == [2.0] * 70


def test_no_ramps() -> None:
    lr = schedule("cosine", warmup_steps=0, cooldown_steps=0)
    assert lr[0] == 2.0
    assert lr[50] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2))
    assert lr == sorted(lr, reverse=True)
    assert schedule("cosine", warmup_steps=200, cooldown_steps=0)[99] == pytest.approx(0.99)
    assert schedule("constant", warmup_steps=100, cooldown_steps=0)[99] == pytest.approx(1.98)
