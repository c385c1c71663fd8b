"""Which layers a stage of a pipeline runs, and which stages a rank has."""

from collections.abc import Sequence
from itertools import accumulate

from megarec.config.model import ModelConfig
from megarec.config.schema import Config, ParallelConfig
from megarec.errors import UserError
from megarec.models.backbone import Part


def parts(config: Config) -> list[Part]:
    """Return the part of the model that each stage runs, in order.

    Stages are contiguous, of FLOPs as even as they get; the head counts to the last one. A looped
    core is not divided. Raises UserError where there are more stages than what can be divided.
    """
    units, costs = divisible(config.model, config.train.seq_len)
    num_stages = config.parallel.pp * config.parallel.stages_per_rank
    if num_stages > len(units):
        core = config.model.stack.core_blocks
        looped = f" (the looped core of {len(core)} is one piece)" if core else ""
        raise UserError(
            f"parallel: pp={config.parallel.pp} x {config.parallel.stages_per_rank} stages a rank "
            f"= {num_stages} stages, but the {config.model.num_layers} layers divide into "
            f"{len(units)}{looped}; use fewer stages"
        )
    ends = balanced(costs, num_stages)
    starts = [0, *ends[:-1]]
    return [
        Part(range(units[start].start, units[end - 1].stop), start == 0, end == len(units))
        for start, end in zip(starts, ends, strict=True)
    ]


def divisible(model: ModelConfig, seq_len: int) -> tuple[list[range], list[float]]:
    """Return the layers that stay together, and what a token costs there in training, in FLOPs."""
    stack, depth = model.stack, model.num_layers
    recurrences, core = stack.training_recurrences(), stack.core_blocks
    run = stack.times_run(depth, recurrences)
    trained = stack.times_trained(depth, recurrences)
    costs = [
        block.flops_per_token(model.d_model, seq_len) * (forward + 2.0 * backward)
        for block, forward, backward in zip(model.layers, run, trained, strict=True)
    ]
    units = [range(i, i + 1) for i in range(depth) if i not in core]
    if core:
        units.insert(core.start, core)
    totals = [sum(costs[i] for i in unit) for unit in units]
    if core:
        totals[core.start] += 3.0 * stack.flops_per_token(model.d_model, recurrences)
    totals[-1] += 6.0 * model.vocab_size * model.d_model
    return units, totals


def balanced(costs: Sequence[float], num_parts: int) -> list[int]:
    """Divide costs into contiguous parts, none empty, whose largest sum is the smallest.

    Returns where each part ends.
    """
    upto = [0.0, *accumulate(costs)]
    # The first n costs in so many parts: their largest sum, and the ends.
    best = {n: (upto[n], [n]) for n in range(1, len(upto))}
    for count in range(2, num_parts + 1):
        longer = {}
        for n in range(count, len(upto)):
            largest, cut = min((max(best[m][0], upto[n] - upto[m]), m) for m in range(count - 1, n))
            longer[n] = (largest, [*best[cut][1], n])
        best = longer
    return best[len(costs)][1]


def rank_of(stage: int, parallel: ParallelConfig) -> int:
    """Return the place in the pipeline that has a stage: in turn, in zbv there and back."""
    turn, place = divmod(stage, parallel.pp)
    return parallel.pp - 1 - place if parallel.pp_schedule == "zbv" and turn else place


def check_micro_batches(parallel: ParallelConfig, count: int) -> None:
    """Raise UserError unless the schedule can run so many micro-batches in a step."""
    pp, schedule = parallel.pp, parallel.pp_schedule
    if schedule == "1f1b" and count < pp:
        raise UserError(
            f"parallel.pp_schedule=1f1b: needs as many micro-batches a step as stages, got {count} "
            f"for pp={pp}; make train.global_batch_size larger or micro_batch_size smaller"
        )
    rounds = max(1, count // pp)
    if schedule in ("interleaved_1f1b", "zero_bubble") and count % rounds:
        raise UserError(
            f"parallel.pp_schedule={schedule}: {count} micro-batches a step do not divide into "
            f"{count} // pp = {rounds} rounds; make their number a multiple of pp={pp}"
        )
