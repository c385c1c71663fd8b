"""The ParaRNN recipes are the published models: sizes, batches, schedules (arXiv 2510.21450)."""

import pytest

from megarec.config.loader import load_config
from megarec.optim.schedule import learning_rate
from megarec.parallel.describe import describe

PUBLISHED = {"400m": 405.6e6, "1b": 1.415e9, "2.9b": 2.902e9, "7b": 6.757e9}
TOKENS = {"400m": 10.5e9, "1b": 28.8e9, "2.9b": 57.7e9, "7b": 138.4e9}


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_dry_runs_are_the_published_models(cell: str, size: str) -> None:
    config = load_config(f"para_{cell}_{size}.yaml")
    lines = describe(config, 1).splitlines()
    count = int(lines[0].removeprefix("parameters: ").replace(",", ""))
    assert count == pytest.approx(PUBLISHED[size], rel=5e-3)
    train = config.train
    tokens = train.steps * train.global_batch_size * train.seq_len
    assert tokens == pytest.approx(TOKENS[size], rel=5e-3)
    # A tenth of warm-up, then a cosine to zero.
    peak = config.optimizer.lr
    assert config.schedule.warmup_steps == train.steps // 10
    assert learning_rate(config.schedule, peak, train.steps // 10, train.steps) == peak
    assert learning_rate(config.schedule, peak, train.steps, train.steps) == pytest.approx(0)
