"""Parallelise a model: one ordered function for every family."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement

from megarec.config.model import ModelConfig
from megarec.config.schema import Config, ParallelConfig
from megarec.models.backbone import Backbone
from megarec.models.block import Block
from megarec.models.recompute import find_ops
from megarec.optim.build import freeze
from megarec.parallel.compile import compile_blocks
from megarec.parallel.mesh import data_mesh
from megarec.parallel.pipeline import Stage, shared_modules, split
from megarec.parallel.stages import parts, rank_of
from megarec.parallel.tensor import split_tensors


@dataclass(frozen=True)
class Sharded:
    """What a rank holds of a model.

    Attributes:
        model: the layers that are here, under their own names.
        stages: of a pipeline, what runs them; empty without one.
        mesh: of all ranks.
        config: the recipe.
    """

    model: Backbone
    stages: list[Stage]
    mesh: DeviceMesh
    config: Config

    @cached_property
    def twins(self) -> frozenset[Tensor]:
        """Parameters that another rank of the pipeline has too, and counts as its own."""
        here = self.mesh["pp"].get_local_rank()
        return frozenset(p for p, other in self.copies().items() if other < here)

    def copies(self) -> dict[nn.Parameter, int]:
        """Return the parameters that are elsewhere in the pipeline too, and at which place."""
        if not self.stages:
            return {}
        here = self.mesh["pp"].get_local_rank()
        found: dict[nn.Parameter, int] = {}
        with torch.device("meta"):
            whole = Backbone(self.config.model)
        for name, stages in shared_modules(whole, parts(self.config)).items():
            ranks = [rank_of(stage, self.config.parallel) for stage in stages]
            if here in ranks:
                (other,) = set(ranks) - {here}
                found |= {p: other for p in self.model.get_submodule(name).parameters()}
        return found


def build_sharded_model(
    config: Config,
    mesh: DeviceMesh,
    device: torch.device,
    compile_backend: str = "inductor",
) -> Sharded:
    """Build what this rank holds of the model; no rank ever holds the whole of it.

    In order: on meta, freeze, split for the pipeline, divide tensors, recompute, compile, shard;
    then initialise. The weights depend on the seed alone, not on the mesh. `compile_backend` is
    torch.compile's.
    Raises UserError for a learning-rate scale that matches no parameter.
    """
    with torch.device("meta"):
        model = Backbone(config.model)
    freeze(model, config.optimizer)
    stages = split(model, config, mesh)
    split_tensors(model, mesh)
    recompute(model, config.parallel)
    if config.parallel.compile:
        compile_blocks(model, compile_backend)
    shard(model, config, mesh, stages)
    model.to_empty(device=device)
    model.init_weights(config.seed, assign_shard)
    return Sharded(model, stages, mesh, config)


def recompute(model: Backbone, parallel: ParallelConfig) -> None:
    """Free activations in the forward pass: of each block, or of each recurrence of a loop.

    `recurrence` keeps nothing of a recurrence of a looped stack but its latent state; the blocks
    outside of the core free their own. Raises UserError for an op in `saved_ops` that is not there.
    """
    what = parallel.activation_checkpointing
    looped = what == "recurrence"
    model.stack.recompute = looped
    saved = find_ops(parallel.saved_ops) if what == "selective" else frozenset()
    for name, block in model.layers():
        block.recompute = what in ("selective", "full") or (
            looped and int(name) not in model.config.stack.core_blocks
        )
        block.saved_ops = saved


def build_frozen_model(
    config: Config, model_config: ModelConfig, mesh: DeviceMesh, device: torch.device
) -> Backbone:
    """Build another model of the same run that does not train, sharded alike, without weights."""
    with torch.device("meta"):
        model = Backbone(model_config)
    model.requires_grad_(False).eval()
    shard(model, config, mesh, [])
    return model.to_empty(device=device)


def shard(model: Backbone, config: Config, mesh: DeviceMesh, stages: Sequence[Stage]) -> None:
    """Apply FSDP2 (HSDP where parameters are replicated too) to each block and the roots.

    A root is what runs: the model, or each stage of a pipeline.

    Modules that a mixer keeps in float32 become units of their own. Master weights are float32;
    gradients are reduced in float32. The core of a looped stack is one unit, gathered once in a
    micro-batch and held over all recurrences, forward and backward (see `release_core`), unless
    `hold_core` is false. One process that computes in float32 has nothing to gather or to cast:
    its model stays as it is, and saves the copies.
    """
    compute = getattr(torch, config.precision.compute)
    if mesh.size() == 1 and compute == torch.float32:
        return
    reshard = config.parallel.reshards_after_forward

    def unit(modules: list[nn.Module], dtype: torch.dtype, reshard_after_forward: bool) -> None:
        policy = MixedPrecisionPolicy(
            # Parameters in the compute dtype already are not cast, whatever it is.
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=None if dtype == torch.float32 else torch.float32,
            cast_forward_inputs=False,
        )
        fully_shard(
            modules,
            mesh=data_mesh(mesh),
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
        )

    held = held_blocks(model, config)
    for _, block in model.layers():
        if compute != torch.float32:
            for module in block.float32_modules():
                unit([module], torch.float32, reshard and block not in held)
        if block not in held:
            unit([block], compute, reshard)
    if held:
        unit(list(held), compute, False)
        for held_unit in held_units(held):
            held_unit.set_reshard_after_backward(False, recurse=False)
    # A root's parameters (embedding, norm, head) are needed again right after the forward.
    roots: Sequence[nn.Module] = stages or [model]
    for root in roots:
        unit([root], compute, False)


def held_blocks(model: Backbone, config: Config) -> list[Block]:
    """Return the blocks that stay gathered over the recurrences of a looped stack."""
    core = model.config.stack.core_blocks if config.parallel.hold_core else range(0)
    return [block for name, block in model.layers() if int(name) in core]


def held_units(held: list[Block]) -> list[FSDPModule]:
    """Return the FSDP units in blocks that are held."""
    modules = [module for block in held for module in block.modules()]
    return [module for module in modules if isinstance(module, FSDPModule)]


def release_core(model: Backbone, config: Config) -> None:
    """Give back what is held, so that gradients reach the shards; call it after each backward."""
    for module in held_units(held_blocks(model, config)):
        module.reshard()


def assign_shard(parameter: Tensor, whole: Tensor) -> None:
    """Write this rank's shard of a whole tensor that every rank has drawn alike."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    mesh = parameter.device_mesh
    # From the innermost axis: tensor parallelism cuts first, FSDP its part.
    for axis in reversed(range(mesh.ndim)):
        whole = _piece(
            whole, parameter.placements[axis], mesh.size(axis), mesh.get_local_rank(axis)
        )
    parameter.to_local().copy_(whole)


def _piece(x: Tensor, placement: Placement, size: int, rank: int) -> Tensor:
    if placement.is_replicate():
        return x
    dim: int = placement.dim  # type: ignore[attr-defined]
    pieces = x.chunk(size, dim)
    # Of an uneven tensor the last ranks may have nothing.
    return pieces[rank] if rank < len(pieces) else x.narrow(dim, 0, 0)
