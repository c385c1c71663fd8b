"""Pipeline parallelism: stages of the model, and what passes between their ranks."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from megarec.config.schema import Config
from megarec.errors import UserError
from megarec.models.backbone import Backbone, Part
from megarec.models.context import Context
from megarec.optim.clip import local_shard
from megarec.parallel.stages import check_micro_batches, parts, rank_of

Rows = tuple[Tensor, Tensor, Context]
"""input_ids and labels, int64 (B, T), and their context."""


class Stage(nn.Module):
    """A part of a model as a module of its own, which shares the model's modules.

    Attributes:
        index: which stage of the pipeline it is.
        rows: the micro-batches that it will run, in order; every rank of a pipeline reads them all.
    """

    def __init__(self, model: Backbone, part: Part, index: int) -> None:
        super().__init__()
        self.part = part
        self.index = index
        self.members = nn.ModuleList(model.modules_of(part).values())
        self.rows: Iterator[Rows] = iter(())
        # Not as a submodule: a stage holds its own parameters only.
        self._model = [model]

    def forward(self, x_BTD: Tensor | None = None) -> Tensor:
        """Run the next micro-batch, on what the stage before returned.

        Returns x (B, T, D), or the summed loss (1,) where the stage is the last.
        """
        input_ids, labels, ctx = next(self.rows)
        result = self._model[0].forward_part(
            self.part, input_ids if x_BTD is None else x_BTD, labels, ctx=ctx
        )
        # Not a view: torch's pipelining frees the graph of what is none.
        return torch.stack([result]) if self.part.last else result


def split(model: Backbone, config: Config, mesh: DeviceMesh) -> list[Stage]:
    """Keep this rank's layers of a model on meta; returns its stages, none without a pipeline."""
    if config.parallel.pp == 1:
        return []
    here = mesh["pp"].get_local_rank()
    every = parts(config)
    mine = [i for i in range(len(every)) if rank_of(i, config.parallel) == here]
    model.keep([every[i] for i in mine])
    return [Stage(model, every[i], i) for i in mine]


def check_stages(config: Config, micro_batches: int) -> None:
    """Raise UserError unless a pipeline can run a recipe with so many micro-batches in a step.

    There may be too few of them, too few layers, or two stages of a rank that share a module.
    """
    check_micro_batches(config.parallel, micro_batches)
    with torch.device("meta"):
        model = Backbone(config.model)
    for name, holders in shared_modules(model, parts(config)).items():
        ranks = [rank_of(stage, config.parallel) for stage in holders]
        if len(set(ranks)) < len(ranks):
            raise UserError(
                f"parallel.pp_schedule={config.parallel.pp_schedule}: stages {holders} both need "
                f"model.{name} and are on one rank, where FSDP cannot shard it for both; choose "
                "another schedule or number of stages, or untie it"
            )


def shared_modules(model: Backbone, every: list[Part]) -> dict[str, list[int]]:
    """Return the modules that several stages need, with the stages, of a model that is whole."""
    holders: dict[str, list[int]] = {}
    for i, part in enumerate(every):
        for name in model.modules_of(part):
            holders.setdefault(name, []).append(i)
    # A stack without parameters may be in each.
    return {
        name: stages
        for name, stages in holders.items()
        if len(stages) > 1 and any(True for _ in model.get_submodule(name).parameters())
    }


def add_twins(pairs: dict[nn.Parameter, int], group: dist.ProcessGroup) -> None:
    """Add up the gradients of parameters that two ranks of a pipeline have.

    `pairs` says at which place in the pipeline's group the other copy is, in the same order of
    parameters on both.
    """
    for parameter, other in pairs.items():
        if parameter.grad is None:
            continue
        ours = local_shard(parameter.grad)
        theirs = torch.empty_like(ours)
        peer = dist.get_global_rank(group, other)
        for work in dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, ours, peer, group),
                dist.P2POp(dist.irecv, theirs, peer, group),
            ]
        ):
            work.wait()
        ours.add_(theirs)
