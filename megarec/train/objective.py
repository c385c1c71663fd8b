"""What a run minimises: the next token's loss, or the distance to a frozen teacher."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from megarec_kernels.linear_distillation import DistillationLoss, linear_distillation
from torch import Tensor, nn

from megarec.config.model import ModelConfig
from megarec.config.schema import DistillConfig
from megarec.errors import UserError
from megarec.models.backbone import Backbone
from megarec.models.context import Context
from megarec.models.head import IGNORE_INDEX

CROSS_ENTROPY = "cross_entropy"
"""The term that is comparable between objectives."""


class Objective(Protocol):
    """A loss over a micro-batch."""

    def __call__(
        self, model: Backbone, input_ids: Tensor, labels: Tensor, ctx: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over the tokens with labels, and its terms, for the log."""


def next_token(
    model: Backbone, input_ids: Tensor, labels: Tensor, ctx: Context
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the summed cross-entropy; it is all there is."""
    loss_sum, _ = model(input_ids, labels, ctx=ctx)
    return loss_sum, {}


class Distillation:
    """DistillConfig's loss against a frozen teacher, which sees the same tokens and documents."""

    def __init__(self, teacher: Backbone, config: DistillConfig) -> None:
        self.teacher = teacher
        self.config = config

    def __call__(
        self, model: Backbone, input_ids: Tensor, labels: Tensor, ctx: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss and its terms; see Objective."""
        matched = self.config.activation_weight > 0
        with torch.no_grad(), mixer_outputs(self.teacher, matched) as theirs:
            teacher_x, teacher_weight = self._teach(input_ids, labels, ctx)
        terms: dict[str, Tensor] = {}

        def criterion(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            sums = self._divergence(model, x, weight, teacher_x, teacher_weight, labels)
            terms.update(divergence=sums.divergence, cross_entropy=sums.cross_entropy)
            return sums.loss

        with mixer_outputs(model, matched) as ours:
            loss, _ = model(input_ids, labels, ctx=ctx, criterion=criterion)
        if matched:
            distance = mean_distance(ours, theirs, labels != IGNORE_INDEX)
            terms["activation_distance"] = distance
            loss = loss + self.config.activation_weight * distance
        return loss, terms

    def _teach(self, input_ids: Tensor, labels: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Return what the teacher's head multiplies: hidden states and the weight.

        The root of a sharded model stays gathered after its forward, so that the weight is whole.
        """
        found: list[Tensor] = []

        def keep(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            found.extend([x, weight])
            return x.new_zeros(())

        self.teacher(input_ids, labels, ctx=ctx, criterion=keep)
        return found[0], found[1]

    def _divergence(self, model: Backbone, *tensors: Tensor) -> DistillationLoss:
        config, head = self.config, model.config.head
        return linear_distillation(
            *tensors,
            divergence=config.divergence,
            temperature=config.temperature,
            kl_weight=config.kl_weight,
            ce_weight=config.ce_weight,
            soft_cap=head.soft_cap,
            teacher_soft_cap=self.teacher.config.head.soft_cap,
            z_loss=head.z_loss,
            ignore_index=IGNORE_INDEX,
            chunk_size=head.chunk_size,
        )


@contextmanager
def mixer_outputs(model: Backbone, wanted: bool) -> Iterator[dict[str, Tensor]]:
    """Collect what each mixer returns inside the block, (B, T, D), by layer; nothing unless wanted.

    Recomputed activations do not count: they come after the block.
    """
    outputs: dict[str, Tensor] = {}

    def keep(layer: str, module: nn.Module, inputs: Any, result: Any) -> None:
        outputs[layer] = result[0]

    handles = [
        block.mixer.register_forward_hook(partial(keep, layer))
        for layer, block in model.layers()
        if wanted and block.mixer is not None
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def mean_distance(ours: dict[str, Tensor], theirs: dict[str, Tensor], kept_BT: Tensor) -> Tensor:
    """Return the L2 distance of two models' mixer outputs (B, T, D) by layer.

    It is averaged over the layers and summed over the tokens kept (B, T): a scalar, in float32 at
    least.
    """
    layers = []
    for layer, y_BTD in ours.items():
        dtype = torch.promote_types(y_BTD.dtype, torch.float32)
        layers.append(torch.linalg.vector_norm(y_BTD.to(dtype) - theirs[layer].to(dtype), dim=-1))
    return (torch.stack(layers).mean(0) * kept_BT).sum()


def check_teacher(teacher: ModelConfig, student: ModelConfig, config: DistillConfig) -> None:
    """Raise UserError, every reason at once, unless the student can learn from the teacher."""
    problems = []
    if teacher.vocab_size != student.vocab_size:
        problems.append(
            f"its vocabulary has {teacher.vocab_size} tokens, model.vocab_size={student.vocab_size}"
        )
    if config.activation_weight > 0:
        if teacher.d_model != student.d_model:
            problems.append(
                f"activation_weight: its width is {teacher.d_model}, model.d_model="
                f"{student.d_model}"
            )
        if _mixer_layers(teacher) != _mixer_layers(student):
            problems.append("activation_weight: its mixers are in other layers than the student's")
    if problems:
        raise UserError(*(f"distill.teacher={config.teacher}: {line}" for line in problems))


def _mixer_layers(config: ModelConfig) -> list[int]:
    return [i for i, block in enumerate(config.layers) if block.mixer is not None]
