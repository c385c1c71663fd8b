"""The device mesh, and the data-parallel arithmetic."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megarec.config.schema import ParallelConfig
from megarec.errors import UserError


def resolve_axes(config: ParallelConfig, world_size: int) -> dict[str, int]:
    """Return the size of each mesh axis, with `dp_shard: -1` filled in.

    Raises:
        UserError: the axes do not multiply to the world size; the message has the arithmetic.
    """
    replicate, shard = config.dp_replicate, config.dp_shard
    if shard == -1:
        shard = max(1, world_size // replicate)
    if replicate * shard != world_size:
        raise UserError(
            f"parallel: dp_replicate={replicate} x dp_shard={shard} = {replicate * shard} "
            f"processes, but {world_size} were started; change one of them "
            "(dp_shard=-1 takes what is left)"
        )
    return {"dp_replicate": replicate, "dp_shard": shard}


def build_mesh(config: ParallelConfig, world_size: int, device_type: str) -> DeviceMesh:
    """Build the mesh over all ranks (UserError as in resolve_axes)."""
    axes = resolve_axes(config, world_size)
    return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
