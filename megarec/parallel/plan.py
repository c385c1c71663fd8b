"""What a recipe needs, computed without building it: parameters, FLOPs, memory per rank."""

from dataclasses import dataclass

from megarec.config.schema import Config
from megarec.data.loader import accumulation_steps
from megarec.models.recompute import find_ops
from megarec.parallel.compile import check_compile
from megarec.parallel.mesh import place, resolve_axes
from megarec.parallel.pipeline import check_stages
from megarec.parallel.tensor import num_params_here


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
    check_compile(config.parallel)
    return Plan(
        axes=axes,
        num_params=config.model.num_params(),
        flops_per_token=config.model.flops_per_token(train.seq_len),
        tokens_per_step=train.global_batch_size * train.seq_len,
        micro_batches=micro_batches,
        memory_bytes=memory_per_rank(config, axes["dp_shard"], micro_batches),
    )


def memory_per_rank(config: Config, dp_shard: int, micro_batches: int = 1) -> dict[str, float]:
    """Estimate the bytes of one rank: states exactly, the rest by formula.

    Sharded float32 parameters and gradients (4 bytes each) and two Adam moments (8). Gathered: the
    root unit, two blocks (one computing, one prefetched) and the core of a looped stack, in the
    compute dtype. Activations: see `activation_bytes`; compiled blocks may keep less. The head: one
    chunk of logits, twice, in float32, and the gradient of its weight.

    In a pipeline stages are taken to be alike. Each rank has its share of everything, once for each
    micro-batch in flight: `micro_batches` in gpipe, elsewhere as many as there are ranks. Of what
    tensor parallelism divides each has its part.
    """
    model, train = config.model, config.train
    width = compute_bytes(config)
    pp, tp = config.parallel.pp, config.parallel.tp
    num_params = num_params_here(model, tp)
    blocks = [block.num_params(model.d_model) / tp for block in model.layers]
    root = num_params - sum(blocks)
    tokens = train.micro_batch_size * train.seq_len
    held = sum(blocks[i] for i in model.stack.core_blocks) if config.parallel.hold_core else 0
    in_flight = micro_batches if config.parallel.pp_schedule == "gpipe" else pp
    gathered = root + 2.0 * max(blocks) + held
    if not config.parallel.reshards_after_forward:
        gathered = num_params / pp
    kept, work = activation_bytes(config)
    chunk = min(model.head.chunk_size, tokens)
    return {
        "parameters": 4.0 * num_params / dp_shard / pp,
        "gradients": 4.0 * num_params / dp_shard / pp,
        "optimizer": 8.0 * num_params / dp_shard / pp,
        "gathered": width * gathered if dp_shard > 1 or width == 2 else 0.0,
        "activations": tokens * (kept * (in_flight / pp if pp > 1 else 1) + work),
        "head": 4.0 * model.vocab_size / tp * (2 * chunk + model.d_model),
    }


def activation_bytes(config: Config) -> tuple[float, float]:
    """Return the bytes a token that a micro-batch keeps for its backward pass, and those at work.

    Each run of a block that is differentiated keeps what the block says, or its input and what
    `selective` saves (the default `saved_ops`), or its input alone; where recurrences are
    recomputed each keeps one latent state. At work is what the backward pass of a block makes and,
    where it is recomputed, what it kept: of one block, or of a whole recurrence; what runs after
    it is free by then. Memory for halting rules is not counted.
    """
    model, how, tp = config.model, config.parallel.activation_checkpointing, config.parallel.tp
    width = compute_bytes(config)
    stream = width * model.d_model / tp
    core, recurrences = model.stack.core_blocks, model.stack.training_recurrences()
    runs = model.stack.times_trained(model.num_layers, recurrences)
    beside = model.stack.activations(model.d_model).bytes(width) / tp
    blocks = [block.activations(model.d_model, config.train.seq_len, tp) for block in model.layers]
    kept = peak = 0.0
    for i in range(model.num_layers):
        if i in core[1:]:
            continue  # The core is one piece, which runs often.
        piece = blocks[core.start : core.stop] if i in core else blocks[i : i + 1]
        around = beside if i in core else 0.0
        everything = around + sum(block.kept.bytes(width) for block in piece)
        if how == "none":
            left, work = everything, max(block.work.bytes(width) for block in piece)
        elif how == "recurrence" and i in core:
            left, work = stream, everything + max(block.work.bytes(width) for block in piece)
        else:
            saved = [block.saved.bytes(width) if how == "selective" else 0.0 for block in piece]
            left = around + sum(stream + x for x in saved)
            work = max((block.kept + block.work).bytes(width) for block in piece)
        kept += runs[i] * left
        peak = max(peak, kept + work)
    return kept, peak - kept


def compute_bytes(config: Config) -> int:
    """Return the size of a number in the compute dtype."""
    return 2 if config.precision.compute == "bfloat16" else 4
