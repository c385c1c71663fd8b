"""Distillation as an objective: the loss that DistillConfig describes, for whole models."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small import model_config, random_model
from torch.nn import functional as F

from megarec.config.schema import DistillConfig
from megarec.errors import UserError
from megarec.models.context import Context
from megarec.train.objective import Distillation, check_teacher, next_token

HYBRID = {
    "blocks": {
        "mamba2": {
            "mixer": {"type": "mamba2", "num_heads": 4, "head_dim": 8, "state_dim": 4},
            "ffn": {"type": "gelu", "d_ff": 20},
        },
        "attention": {"mixer": {"type": "attention", "num_heads": 4}},
    },
    "pattern": ["mamba2", "attention"],
}


def batch() -> tuple[torch.Tensor, torch.Tensor, Context]:
    ids = torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:, 5] = -100
    doc_ids = torch.tensor([[0] * 6 + [1] * 7, [0] * 13])
    return ids, labels, Context.from_doc_ids(doc_ids)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_loss_is_what_the_config_says(divergence: Any) -> None:
    teacher = random_model(seed=1).double()
    student = random_model(model_config(**HYBRID)).double().train()
    config = DistillConfig(
        teacher="",
        divergence=divergence,
        temperature=2.0,
        kl_weight=0.6,
        ce_weight=0.3,
        activation_weight=0.2,
    )
    ids, labels, ctx = batch()
    loss, terms = Distillation(teacher, config)(student, ids, labels, ctx)

    outputs: dict[str, list[torch.Tensor]] = {"teacher": [], "student": []}
    for name, model in (("teacher", teacher), ("student", student)):
        for block in model.blocks.values():
            block.mixer.register_forward_hook(
                lambda module, inputs, result, name=name: outputs[name].append(result[0])
            )
    kept = labels != -100
    z, p = student(ids, ctx=ctx)[kept], teacher(ids, ctx=ctx)[kept]
    q, p = (z / 2).log_softmax(-1), (p / 2).log_softmax(-1)
    pair = (q, p) if divergence == "forward_kl" else (p, q)
    kl = F.kl_div(*pair, reduction="sum", log_target=True)
    ce = F.cross_entropy(z, labels[kept], reduction="sum")
    distances = [
        (ours - theirs).square().sum(-1).sqrt()[kept].sum()
        for ours, theirs in zip(outputs["student"], outputs["teacher"], strict=True)
    ]
    distance = sum(distances) / 2
    torch.testing.assert_close(terms["divergence"], kl.detach())
    torch.testing.assert_close(terms["cross_entropy"], ce.detach())
    torch.testing.assert_close(terms["activation_distance"], distance)
    torch.testing.assert_close(loss, 0.6 * 4 * kl + 0.3 * ce + 0.2 * distance)

    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_copy_of_the_teacher_has_nothing_to_learn() -> None:
    ids, labels, ctx = batch()
    student = random_model().train()
    config = DistillConfig(teacher="", activation_weight=1.0)
    loss, terms = Distillation(random_model(), config)(student, ids, labels, ctx)
    assert loss.abs() < 1e-4 and terms["activation_distance"] == 0
    plain, _ = next_token(student, ids, labels, ctx)
    torch.testing.assert_close(terms["cross_entropy"], plain.detach())


def test_recomputing_activations_changes_nothing() -> None:
    ids, labels, ctx = batch()
    gradients = []
    for recompute in (False, True):
        student = random_model(model_config(**HYBRID)).train()
        for block in student.blocks.values():
            block.recompute = recompute
        config = DistillConfig(teacher="", activation_weight=0.5)
        loss, _ = Distillation(random_model(), config)(student, ids, labels, ctx)
        loss.backward()
        gradients.append([p.grad for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_teacher_that_does_not_fit_is_refused_with_every_reason() -> None:
    student = model_config()
    config = DistillConfig(teacher="runs/big", activation_weight=1.0)
    teacher = model_config(vocab_size=64, d_model=64, num_layers=4)
    with pytest.raises(UserError) as caught:
        check_teacher(teacher, student, config)
    assert len(caught.value.lines) == 3
    assert all(line.startswith("distill.teacher=runs/big: ") for line in caught.value.lines)
    # Without activation matching, width and depth are the teacher's own business.
    deep = model_config(d_model=64, num_layers=4)
    check_teacher(deep, student, DistillConfig(teacher="runs/big"))
    with pytest.raises(ValidationError, match="the teacher has no say"):
        DistillConfig(teacher="", kl_weight=0.0, ce_weight=1.0)
