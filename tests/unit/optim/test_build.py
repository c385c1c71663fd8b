"""The optimizer: what decays, learning-rate factors by name, and what is frozen."""

import pytest
import torch
from small import random_model

from megarec.config.schema import OptimizerConfig
from megarec.errors import UserError
from megarec.optim.build import build_optimizer, freeze, learning_rate_scales, set_learning_rate


def test_the_first_glob_that_matches_counts() -> None:
    names = ["embedding.weight", "blocks.0.mixer.q.weight", "blocks.1.mixer.q.weight"]
    config = OptimizerConfig(lr=1.0, lr_scale={"blocks.1.*": 0.5, "blocks.*": 2.0})
    assert list(learning_rate_scales(names, config).values()) == [1.0, 2.0, 0.5]


def test_a_glob_that_matches_nothing_is_named() -> None:
    config = OptimizerConfig(lr=1.0, lr_scale={"block.*": 0.5, "*": 1.0, "*.gate": 0.0})
    with pytest.raises(UserError) as caught:
        learning_rate_scales(["blocks.0.ffn.up.weight"], config)
    assert [line.split("'")[1] for line in caught.value.lines] == ["block.*", "*.gate"]


def test_a_factor_scales_the_update_and_zero_freezes() -> None:
    scales = {"embedding.*": 0.0, "blocks.0.*": 0.5}
    updates = {}
    for key, lr_scale in (("plain", {}), ("scaled", scales)):
        config = OptimizerConfig(lr=1e-2, weight_decay=0.1, lr_scale=lr_scale)
        model = random_model().train()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        freeze(model, config)
        optimizer = build_optimizer(model, config)
        set_learning_rate(optimizer, 1e-2)
        ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
        model(ids, labels=ids.roll(-1, 1))[0].backward()
        optimizer.step()
        updates[key] = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        assert (model.embedding.weight.grad is None) == (key == "scaled")
    for name, plain in updates["plain"].items():
        factor = 0.0 if name.startswith("embedding") else 0.5 if "blocks.0." in name else 1.0
        # Adam's first update is of one size whatever the gradient.
        torch.testing.assert_close(updates["scaled"][name], factor * plain, rtol=1e-3, atol=1e-7)
