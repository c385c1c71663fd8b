"""What a recipe needs, computed without building it: parameters, FLOPs, memory per rank."""

from dataclasses import dataclass

from megarec.config.schema import Config
from megarec.config.stack import repeated
from megarec.data.loader import accumulation_steps
from megarec.models.block import find_ops
from megarec.parallel.mesh import place, resolve_axes
from megarec.parallel.pipeline import check_stages


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Attributes:
        axes: mesh axis -> size.
        num_params: of the whole model.
        flops_per_token: of one training step, forward and backward, without recomputation.
        tokens_per_step: of the global batch.
        micro_batches: accumulated by each rank in one step.
        memory_bytes: of one rank, by kind; an estimate.
    """

    axes: dict[str, int]
    num_params: int
    flops_per_token: float
    tokens_per_step: int
    micro_batches: int
    memory_bytes: dict[str, float]


def plan(config: Config, world_size: int) -> Plan:
    """Compute the plan of a recipe on `world_size` processes (UserError if it does not fit)."""
    axes = resolve_axes(config.parallel, world_size)
    train = config.train
    data_ranks = place(config.parallel, 0, world_size).data_ranks
    micro_batches = accumulation_steps(train.global_batch_size, train.micro_batch_size, data_ranks)
    if axes["pp"] > 1:
        check_stages(config, micro_batches)
    find_ops(config.parallel.saved_ops)
    return Plan(
        axes=axes,
        num_params=config.model.num_params(),
        flops_per_token=config.model.flops_per_token(train.seq_len),
        tokens_per_step=train.global_batch_size * train.seq_len,
        micro_batches=micro_batches,
        memory_bytes=memory_per_rank(config, axes["dp_shard"], micro_batches),
    )


def memory_per_rank(config: Config, dp_shard: int, micro_batches: int = 1) -> dict[str, float]:
    """Estimate the bytes of one rank: states exactly, activations by formula.

    Sharded float32 parameters and gradients (4 bytes each) and two Adam moments (8). Gathered: the
    root unit, two blocks (one computing, one prefetched) and the core of a looped stack, in the
    compute dtype. Activations, a token and run of a block that is differentiated: the residual
    stream alone where blocks are recomputed (plus one block at work); otherwise every matmul's
    input and output, about the block's parameters / d_model numbers. Where recurrences are
    recomputed: one latent state each (plus one recurrence at work). The head: one chunk of logits,
    twice, in float32, and the gradient of its weight.

    In a pipeline stages are taken to be alike. Each rank has its share of everything, once for each
    micro-batch in flight: `micro_batches` in gpipe, elsewhere as many as there are ranks.
    """
    model, train = config.model, config.train
    width = 2 if config.precision.compute == "bfloat16" else 4
    num_params = model.num_params()
    blocks = [block.num_params(model.d_model) for block in model.layers]
    root = num_params - sum(blocks)
    tokens = train.micro_batch_size * train.seq_len
    per_token = [params / model.d_model + 2 * model.d_model for params in blocks]
    depth = model.stack.training_recurrences()
    runs = model.stack.times_trained(len(blocks), depth)
    core = model.stack.core_blocks
    checkpointing = config.parallel.activation_checkpointing
    if checkpointing == "full":
        activations = sum(runs) * model.d_model + max(per_token)
    elif checkpointing == "recurrence":
        outside = len(blocks) - len(core)
        activations = (outside + max(runs)) * model.d_model + sum(per_token[i] for i in core)
    else:
        activations = repeated(per_token, runs)
    held = sum(blocks[i] for i in core) if config.parallel.hold_core else 0
    pp = config.parallel.pp
    in_flight = micro_batches if config.parallel.pp_schedule == "gpipe" else pp
    gathered = root + 2.0 * max(blocks) + held
    if not config.parallel.reshards_after_forward:
        gathered = num_params / pp
    chunk = min(model.head.chunk_size, tokens)
    return {
        "parameters": 4.0 * num_params / dp_shard / pp,
        "gradients": 4.0 * num_params / dp_shard / pp,
        "optimizer": 8.0 * num_params / dp_shard / pp,
        "gathered": width * gathered if dp_shard > 1 or width == 2 else 0.0,
        "activations": width * tokens * activations * (in_flight / pp if pp > 1 else 1),
        "head": 4.0 * model.vocab_size * (2 * chunk + model.d_model),
    }
