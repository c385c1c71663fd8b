"""Pipeline parallelism: stages of the model, and the schedules that run them."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from megarec.config.schema import Config
from megarec.models.backbone import Backbone, Part


class Stage(nn.Module):
    """A part of a model as a module of its own, which shares the model's modules."""

    def __init__(self, model: Backbone, part: Part) -> None:
        super().__init__()
        self.part = part
        self.members = nn.ModuleList(model.modules_of(part).values())
        # Not as a submodule: a stage holds its own parameters only.
        self._model = [model]


def split(model: Backbone, config: Config, mesh: DeviceMesh) -> list[Stage]:
    """Keep this rank's layers of a model on meta; returns its stages, none without a pipeline."""
    return []
