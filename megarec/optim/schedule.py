"""Learning-rate schedules: pure functions of the step."""

import math

from megarec.config.schema import ScheduleConfig


def learning_rate(config: ScheduleConfig, peak: float, step: int, num_steps: int) -> float:
    """Return the learning rate of one update.

    With W warm-up steps, Cd cool-down steps, T steps and ratio r, progress p = (t - W) / (T - W -
    Cd): linear t / W * peak while t < W; then peak * r^p (exponential), peak * (r + (1 - r)(1 +
    cos(pi p)) / 2) (cosine), or peak (wsd, constant); in the last Cd steps linearly from the value
    reached to 0 (xLSTM 7B, arXiv 2503.13427: exponential with all three phases).

    Args:
        config: the schedule section.
        peak: the learning rate at the end of the warm-up.
        step: t, the number of updates already made.
        num_steps: T.
    """
    warmup, cooldown = config.warmup_steps, config.cooldown_steps
    if step < warmup:
        return peak * step / warmup
    decay_steps = num_steps - warmup - cooldown
    progress = min(1.0, (step - warmup) / decay_steps) if decay_steps else 1.0
    remaining = min(1.0, (num_steps - step) / cooldown) if cooldown else 1.0
    return peak * _decay(config, progress) * remaining


def _decay(config: ScheduleConfig, progress: float) -> float:
    ratio = config.final_lr_ratio
    if config.type == "exponential":
        return ratio**progress
    if config.type == "cosine":
        return ratio + (1 - ratio) * (1 + math.cos(math.pi * progress)) / 2
    return 1.0
