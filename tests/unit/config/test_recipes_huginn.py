"""The Huginn recipe is the published model and its training (arXiv 2502.05171)."""

from pathlib import Path

import numpy
import pytest
import torch

from megarec.config.loader import load_config
from megarec.config.schema import Config
from megarec.models import Backbone
from megarec.models.init import Initializer, assign_whole
from megarec.optim.build import build_optimizer
from megarec.optim.ellis_adam import ELLISAdam
from megarec.optim.schedule import learning_rate
from megarec.parallel.describe import describe

SAMPLER = Path(__file__).parents[2] / "golden/recurrent_depth/d_sampler.npz"
D, INNER, HEADS, VOCAB = 5280, 17920, 55, 65536


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("huginn_3.5b.yaml")


def test_size_by_hand(config: Config) -> None:
    # Projections of attention, gated FFN, four norms, biases of queries and keys.
    block = 4 * D * D + 3 * D * INNER + 4 * D + 2 * D
    adapter = 2 * D * D
    by_hand = 8 * block + adapter + VOCAB * D + D
    assert f"{by_hand:,}" == "3,564,976,800"
    lines = describe(config, 1).splitlines()
    assert lines[0] == "parameters: 3,564,976,800"
    assert "processes: 4096 (dp_replicate 512 x dp_shard 8)" in lines
    # The figure published leaves out the adapter and the norms of the blocks.
    assert by_hand - adapter - 8 * 4 * D == 3_509_051_040
    # 181 GFLOP a token with 25 free recurrences and 8 that are differentiated.
    assert config.model.flops_per_token(4096) == pytest.approx(181e9, rel=5e-3)


def test_shape(config: Config) -> None:
    model = config.model
    assert model.embedding_scale == D**0.5
    assert len(model.runs) == 132
    block = model.blocks["attention"]
    assert block.norm_placement == "sandwich" and block.mixer is not None
    with torch.device("meta"):
        built = Backbone(model)
    shapes = {name: tuple(p.shape) for name, p in built.named_parameters()}
    assert shapes["stack.adapter.weight"] == (D, 2 * D)
    assert shapes["blocks.7.mixer.k.bias"] == (D,) and D // HEADS == 96
    assert "head.weight" not in shapes and "blocks.0.mixer.v.bias" not in shapes


def test_initial_weights(config: Config) -> None:
    init = Initializer(config.model, {}, 0, assign_whole)
    std = (2 / (5 * D)) ** 0.5
    assert init.std == pytest.approx(std) == pytest.approx(0.008704, rel=1e-4)
    assert init.out_std == pytest.approx(std / 264**0.5) == pytest.approx(5.357e-4, rel=1e-4)
    assert config.model.init.cut == 3.0
    # The latent state starts like a scaled embedding.
    assert config.model.stack.initial_std == pytest.approx(std * config.model.embedding_scale)


def test_depth_is_drawn_as_published(config: Config) -> None:
    stack = config.model.stack
    assert stack.depth.per == "micro_batch" and stack.training_recurrences() == 33
    with numpy.load(SAMPLER) as file:
        steps, published = file["steps"], file["n"] + file["k"]
    drawn = [stack.depth.draw(config.seed, int(step) - 1, stack.backprop) for step in steps[:300]]
    assert drawn == published[:300].tolist()


def test_optimization(config: Config) -> None:
    with torch.device("meta"):
        optimizer = build_optimizer(Backbone(config.model), config.optimizer)
    assert isinstance(optimizer, ELLISAdam) and optimizer.defaults["eps"] == 1e-6
    kept = {
        group["weight_decay"]: sum(p.numel() for p in group["params"])
        for group in optimizer.param_groups
    }
    # All but norms and biases decays, the embedding too.
    vectors = 8 * (4 * D + 2 * D) + D
    assert kept == {4e-5: config.model.num_params() - vectors, 0.0: vectors}
    peak, steps = config.optimizer.lr, config.train.steps
    rates = {step: learning_rate(config.schedule, peak, step, steps) for step in (0, 2048, 4096)}
    assert rates == {0: 0, 2048: pytest.approx(2e-5), 4096: 4e-5}
    assert learning_rate(config.schedule, peak, steps - 1, steps) == 4e-5
    tokens = steps * config.train.global_batch_size * config.train.seq_len
    assert tokens == pytest.approx(795e9, rel=1e-3)
    assert config.evaluation.num_recurrences == (1, 4, 8, 16, 32, 64)
