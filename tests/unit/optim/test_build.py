"""The optimizer: what decays, learning-rate factors by name, and what is frozen."""

import pytest
import torch
from small import model_config, random_model

from megarec.config.loader import load_config
from megarec.config.schema import OptimizerConfig
from megarec.errors import UserError
from megarec.optim.build import (
    build_optimizer,
    freeze,
    is_decayed,
    learning_rate_scales,
    set_learning_rate,
)
from megarec.optim.ellis_adam import ELLISAdam


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


def optimizer_section(*overrides: str) -> OptimizerConfig:
    return load_config("xlstm_7b.yaml", [f"optimizer.{o}" for o in overrides]).optimizer


@pytest.mark.parametrize("kind", ["adamw", "ellis_adam"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_decays(kind: str, tied: bool) -> None:
    model = random_model(model_config(head={"tie_embeddings": tied}))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = {}
    for embeddings in (False, True):
        config = OptimizerConfig.model_validate(
            {"type": kind, "lr": 1.0, "weight_decay": 0.1, "decay_embeddings": embeddings}
        )
        decayed[embeddings] = {
            names[parameter]
            for group in build_optimizer(model, config).param_groups
            for parameter in group["params"]
            if group["weight_decay"] == 0.1
        }
    matrices = {n for n, p in model.named_parameters() if p.ndim >= 2}
    assert decayed[True] == matrices
    assert decayed[False] == matrices - {"embedding.weight"}
    assert ("head.weight" in decayed[False]) == (not tied)
    assert not any("norm" in name or name.endswith("bias") for name in decayed[True])


def test_vectors_of_recurrences_are_embeddings() -> None:
    weight = torch.nn.Parameter(torch.empty(4, 8))
    assert not is_decayed("stack.step_embedding.weight", weight)
    assert is_decayed("stack.step_embedding.weight", weight, embeddings=True)


def test_each_type_has_its_own_optimizer_and_defaults() -> None:
    config = OptimizerConfig(lr=1.0)
    assert (config.type, config.eps, config.weight_decay) == ("adamw", 1e-8, 0.1)
    assert type(build_optimizer(random_model(), config)) is torch.optim.AdamW
    config = OptimizerConfig(lr=1.0, type="ellis_adam")
    assert (config.eps, config.weight_decay) == (1e-6, 4e-5)
    given = optimizer_section("type=ellis_adam", "betas=[0.8, 0.9]", "eps=1e-5", "weight_decay=0.5")
    optimizer = build_optimizer(random_model(), given)
    assert type(optimizer) is ELLISAdam
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.5]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["type=adam"], "optimizer.type='adam': Input should be 'adamw' or 'ellis_adam'"),
        (["type=ellis_adam", "epz=1"], "optimizer.epz=1: unknown key; did you mean 'eps'?"),
        (["type=ellis_adam", "weight_decay=1.0"], "optimizer: weight_decay=1: ellis_adam"),
        (["betas=[0.9, 1.0]"], "optimizer.betas.1=1.0: Input should be less than 1"),
        (["decay_embeddings=1"], "optimizer.decay_embeddings=1: Input should be a valid boolean"),
    ],
)
def test_bad_options_are_one_line_each(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        optimizer_section(*overrides)
    (line,) = caught.value.lines
    assert message in line
