"""Tensor parallelism."""

from torch.distributed.device_mesh import DeviceMesh

from megarec.models.backbone import Backbone


def split_tensors(model: Backbone, mesh: DeviceMesh) -> None:
    """Split the parameters of a model on meta over the ranks of a mesh, in place."""
