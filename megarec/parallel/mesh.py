"""The device mesh, where a rank stands in it, and the arithmetic of its axes."""

import math
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megarec.config.schema import ParallelConfig
from megarec.errors import UserError

DATA_AXES = ("dp_replicate", "dp_shard")
AXES = ("pp", *DATA_AXES, "cp", "tp")
"""From the outermost, whose ranks lie furthest apart, to the innermost."""


@dataclass(frozen=True)
class Place:
    """Where a rank stands: what it reads and what it counts.

    Attributes:
        data_rank: which part of a batch it reads; ranks of one data rank read the same.
        data_ranks: number of parts.
        pp_rank: its place in the pipeline.
        tp_rank: its place among those that divide heads, vocabulary and tokens.
    """

    data_rank: int
    data_ranks: int
    pp_rank: int
    tp_rank: int

    @property
    def counts_data(self) -> bool:
        """Whether this rank's data count in sums over all ranks: each data rank counts once."""
        return self.pp_rank == self.tp_rank == 0

    @property
    def counts_loss(self) -> bool:
        """Whether the loss that this rank finds counts: those who divide tensors find the same."""
        return self.tp_rank == 0


ALONE = Place(data_rank=0, data_ranks=1, pp_rank=0, tp_rank=0)
"""The place of a process without others."""


def resolve_axes(config: ParallelConfig, world_size: int) -> dict[str, int]:
    """Return the size of each mesh axis, outermost first, with `dp_shard: -1` filled in.

    Raises:
        UserError: the axes do not multiply to the world size; the message has the arithmetic.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    if sizes["dp_shard"] == -1:
        sizes["dp_shard"] = 1
        sizes["dp_shard"] = max(1, world_size // math.prod(sizes.values()))
    if math.prod(sizes.values()) != world_size:
        factors = " x ".join(f"{axis}={size}" for axis, size in shown(sizes).items())
        raise UserError(
            f"parallel: {factors} = {math.prod(sizes.values())} processes, but {world_size} were "
            "started; change one of them (dp_shard=-1 takes what is left)"
        )
    return sizes


def shown(sizes: dict[str, int]) -> dict[str, int]:
    """Return the axes that are worth naming: those of data, and what else is larger than 1."""
    return {axis: size for axis, size in sizes.items() if axis in DATA_AXES or size > 1}


def place(config: ParallelConfig, rank: int, world_size: int) -> Place:
    """Return where a rank stands (UserError as in resolve_axes)."""
    sizes, at = resolve_axes(config, world_size), {}
    for axis in reversed(AXES):
        rank, at[axis] = divmod(rank, sizes[axis])
    data_rank = at["dp_replicate"] * sizes["dp_shard"] + at["dp_shard"]
    data_ranks = sizes["dp_replicate"] * sizes["dp_shard"]
    return Place(data_rank, data_ranks, at["pp"], at["tp"])


def build_mesh(config: ParallelConfig, world_size: int, device_type: str) -> DeviceMesh:
    """Build the mesh over all ranks (UserError as in resolve_axes)."""
    axes = resolve_axes(config, world_size)
    return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the axes over which parameters are sharded, and replicated where they are."""
    return mesh[DATA_AXES] if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"]
