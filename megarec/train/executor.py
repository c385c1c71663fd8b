"""Run micro-batches: on a model that is whole here, or through the stages of a pipeline."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarec.config.schema import Config
from megarec.models.context import Context
from megarec.parallel.apply import Sharded, release_core
from megarec.train.objective import Objective


@dataclass(frozen=True)
class MicroBatch:
    """Rows on the device: `input_ids` and `labels` int64 (B, T), and their context."""

    input_ids: Tensor
    labels: Tensor
    ctx: Context


class Executor(ABC):
    """Runs this rank's part of the work on micro-batches; every method is collective."""

    @abstractmethod
    def forward_backward(self, batches: Sequence[MicroBatch], scale: float) -> dict[str, Tensor]:
        """Accumulate the gradients of `scale` times the summed loss of all micro-batches.

        Returns the sums of the `loss` and of the objective's terms, float64 scalars; of a pipeline
        only ranks with its last stage have any.
        """

    @abstractmethod
    def loss_sum(self, input_ids: Tensor, labels: Tensor, ctx: Context) -> Tensor:
        """Return the summed loss of a micro-batch, a scalar, without gradients; else as above."""


class Direct(Executor):
    """All layers are on this rank."""

    def __init__(self, sharded: Sharded, config: Config, objective: Objective) -> None:
        self.model = sharded.model
        self.config = config
        self.objective = objective

    def forward_backward(self, batches: Sequence[MicroBatch], scale: float) -> dict[str, Tensor]:
        """Run one micro-batch after the other; see Executor."""
        sums: dict[str, Tensor] = {}
        for batch in batches:
            loss, terms = self.objective(self.model, batch.input_ids, batch.labels, batch.ctx)
            (loss * scale).backward()
            release_core(self.model, self.config)
            for name, term in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0.0) + term.detach().double()
        return sums

    @torch.no_grad()
    def loss_sum(self, input_ids: Tensor, labels: Tensor, ctx: Context) -> Tensor:
        """Run the model; see Executor."""
        loss: Tensor = self.model(input_ids, labels, ctx=ctx)[0]
        return loss
