"""Run micro-batches: on a model that is whole here, or through the stages of a pipeline."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from megarec.config.schema import Config
from megarec.models.context import Context
from megarec.parallel.apply import Sharded, release_core
from megarec.parallel.pipeline import Stage, add_twins
from megarec.parallel.stages import rank_of
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

        Returns the sums of the `loss` and of the objective's terms, float64 scalars. Of a pipeline
        only ranks with its last stage have any; ranks that divide tensors all have the same.
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


class Pipelined(Executor):
    """The layers are divided into stages over the ranks of a pipeline.

    Gradients are accumulated unsharded and reduced once, after the last micro-batch.
    """

    def __init__(self, sharded: Sharded, config: Config, device: torch.device) -> None:
        self.sharded = sharded
        self.config = config
        self.device = device
        self.group = sharded.mesh["pp"].get_group()
        self.num_stages = config.parallel.pp * config.parallel.stages_per_rank
        self.copies = sharded.copies()
        self.dtype = next(sharded.model.parameters()).dtype
        self.scale = 1.0
        self._schedules: dict[int, Any] = {}

    def forward_backward(self, batches: Sequence[MicroBatch], scale: float) -> dict[str, Tensor]:
        """Run the schedule; see Executor."""
        self.scale = scale
        for stage in self.sharded.stages:
            stage.rows = iter([(batch.input_ids, batch.labels, batch.ctx) for batch in batches])
        schedule = self._schedule(len(batches))
        losses = schedule.step(target=torch.empty(len(batches), device=self.device))
        self._reshard()
        add_twins(self.copies, self.group)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        return {"loss": total if losses is None else losses.detach().double().sum()}

    @torch.no_grad()
    def loss_sum(self, input_ids: Tensor, labels: Tensor, ctx: Context) -> Tensor:
        """Pass the micro-batch from stage to stage; see Executor."""
        loss = torch.zeros((), device=self.device)
        here, parallel = dist.get_rank(self.group), self.config.parallel
        x = self._boundary(*input_ids.shape)
        for stage in self.sharded.stages:
            stage.rows = iter([(input_ids, labels, ctx)])
            before, after = stage.index - 1, stage.index + 1
            if before >= 0 and rank_of(before, parallel) != here:
                dist.recv(x, group=self.group, group_src=rank_of(before, parallel))
            result = stage() if stage.part.first else stage(x)
            if stage.part.last:
                loss = result[0]
            elif rank_of(after, parallel) == here:
                x = result
            else:
                dist.send(result, group=self.group, group_dst=rank_of(after, parallel))
        self._reshard()
        return loss

    def _boundary(self, batch_size: int, num_tokens: int) -> Tensor:
        """Return an empty tensor like what goes from stage to stage."""
        compute = getattr(torch, self.config.precision.compute)
        # Without mixed precision activations are what parameters are.
        dtype = self.dtype if compute == torch.float32 else compute
        here = num_tokens // self.config.parallel.tp
        return torch.empty(
            batch_size, here, self.config.model.d_model, dtype=dtype, device=self.device
        )

    def _schedule(self, num_micro_batches: int) -> Any:
        if num_micro_batches not in self._schedules:
            stages = [self._torch_stage(stage) for stage in self.sharded.stages]
            kind = SCHEDULES[self.config.parallel.pp_schedule]
            single = kind in (ScheduleGPipe, Schedule1F1B)
            self._schedules[num_micro_batches] = kind(
                stages[0] if single else stages,
                num_micro_batches,
                loss_fn=lambda loss, _: loss.sum() * self.scale,
                scale_grads=False,
            )
        return self._schedules[num_micro_batches]

    def _torch_stage(self, stage: Stage) -> PipelineStage:
        # Shapes are given: to find them, torch would run the stages once more.
        train = self.config.train
        x = self._boundary(train.micro_batch_size, train.seq_len).to("meta").requires_grad_()
        loss = torch.empty(1, device="meta", requires_grad=True)
        return PipelineStage(
            stage,
            stage.index,
            self.num_stages,
            self.device,
            input_args=() if stage.part.first else (x,),
            output_args=(loss,) if stage.part.last else (x,),
            group=self.group,
        )

    def _reshard(self) -> None:
        """Give back what was gathered: the optimizer and checkpoints want the shards."""
        for stage in self.sharded.stages:
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
