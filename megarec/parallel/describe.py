"""The text of a dry run."""

import math

import torch
import yaml

from megarec.config.schema import Config
from megarec.config.stack import LoopedConfig
from megarec.errors import UserError
from megarec.models.backbone import Backbone
from megarec.parallel.mesh import AXES, shown
from megarec.parallel.plan import plan

MIB, GIB = 2**20, 2**30


def describe(config: Config, world_size: int) -> str:
    """Build the model on meta and say what the run needs; the resolved config comes last.

    A recipe that names its mesh in full is described for that mesh, whatever `world_size` is.

    Raises:
        UserError: the batch or the mesh do not fit, or the model is not what its config counts.
    """
    parallel = config.parallel
    if parallel.dp_shard != -1:
        world_size = math.prod(getattr(parallel, axis) for axis in AXES)
    sizes = plan(config, world_size)
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in Backbone(config.model).parameters())
    if built != sizes.num_params:
        raise UserError(
            f"model: built {built:,} parameters, but the config counts {sizes.num_params:,}: "
            "num_params() of a mixer is wrong"
        )
    train = config.train
    axes = " x ".join(f"{axis} {size}" for axis, size in shown(sizes.axes).items())
    memory = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in sizes.memory_bytes.items())
    teacher = []
    if config.distill is not None:
        path = config.distill.teacher
        teacher = [f"teacher: {path} (sharded alike; its memory and FLOPs are not counted)"]
    loop = []
    stack = config.model.stack
    if isinstance(stack, LoopedConfig):
        last = "all" if stack.backprop is None else f"the last {stack.backprop}"
        loop = [
            f"recurrences: {stack.training_recurrences():g} on average in training, {last} "
            f"differentiated; {stack.num_recurrences} in evaluation and decoding"
        ]
    lines = [
        f"parameters: {sizes.num_params:,}",
        f"FLOPs per token: {sizes.flops_per_token / 1e9:.4g} GFLOP (forward and backward)",
        *loop,
        f"decoding state: {_decoding_state(config)} (float32)",
        f"processes: {world_size} ({axes})",
        f"memory per rank: about {sum(sizes.memory_bytes.values()) / GIB:.2f} GiB ({memory})",
        f"batch: {train.global_batch_size} samples x {train.seq_len} tokens = "
        f"{sizes.tokens_per_step:,} tokens a step, {sizes.micro_batches} micro-batches a rank",
        f"steps: {train.steps:,}",
        f"tokens: {train.steps * sizes.tokens_per_step:,}",
        f"training FLOPs: {train.steps * sizes.tokens_per_step * sizes.flops_per_token:.3e}",
        *teacher,
        "",
        yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).rstrip(),
    ]
    return "\n".join(lines)


def _decoding_state(config: Config) -> str:
    """Give the size of one sequence's state, and at which length if it grows as attention's."""
    length = config.train.seq_len
    first, last = (config.model.state_bytes(tokens) / MIB for tokens in (0, length))
    size = f"{last:.2f} MiB a sequence"
    return size if first == last else f"{size} of {length:,} tokens, {first:.2f} MiB at its start"
