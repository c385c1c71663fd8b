"""Tensor parallelism: ranks divide heads, channels and vocabulary, and between those the tokens.

Every parameter becomes a DTensor on the mesh's `tp`. Modules know nothing of it: while its forward
runs, a module's parameters are plain tensors, this rank's part of them, and hooks gather the tokens
before a mixer, an FFN and the head, and scatter what comes out. A block so costs two all-gathers
and two reduce-scatters forward, and as many backward; the embedding one reduce-scatter, the head
one all-gather and, for each chunk of tokens, two all-reduces of a few numbers a token.
"""

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.distributed as dist
from megarec_kernels.linear_cross_entropy import VocabularyPart
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from megarec.config.model import ModelConfig
from megarec.models.backbone import Backbone
from megarec.models.context import Context
from megarec.models.head import Head
from megarec.parallel.collectives import gather, reduce_scatter

TIME = 1
"""The dim of tokens in activations (B, T, D)."""


def split_tensors(model: Backbone, mesh: DeviceMesh) -> None:
    """Divide a model on meta over the ranks of `tp`; one rank alone keeps it as it is.

    Its sizes must divide, see ModelConfig.tp_problems. What is left runs whole sequences only.
    """
    tp = mesh["tp"]
    if tp.size() == 1:
        return
    for name, placement in layout(model).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, leaf, _distributed(module.get_parameter(leaf), tp, placement))
    for module in model.modules():
        if any(True for _ in _own_parameters(module)):
            _show_parts(module)
    group = tp.get_group()
    for _, block in model.layers():
        for branch in (block.mixer, block.ffn):
            if branch is not None:
                _gather_tokens(branch, group)
    _tell_where(model.stack, group)
    if model.embedding is not None:
        _divide_embedding(model.embedding, group)
    if model.head is not None:
        _divide_head(model.head, model.config.vocab_size, group)


def layout(model: Backbone) -> dict[str, Placement]:
    """Return how each parameter lies on the ranks of `tp`, by name; what no plan has: whole."""
    plan = {"embedding.weight": "column", "head.weight": "column"}
    for i, block in model.layers():
        for kind, branch in {"mixer": block.mixer, "ffn": block.ffn}.items():
            styles = {} if branch is None else branch.tp_plan()
            plan |= {f"blocks.{i}.{kind}.{glob}": style for glob, style in styles.items()}
    dims = {name: divided_dim(name, p, plan) for name, p in model.named_parameters()}
    return {name: Replicate() if dim is None else Shard(dim) for name, dim in dims.items()}


def num_params_here(config: ModelConfig, tp: int) -> int:
    """Return the number of a model's parameters that each of `tp` ranks has."""
    if tp == 1:
        return config.num_params()
    with torch.device("meta"):
        model = Backbone(config)
    placements = layout(model)
    return sum(
        parameter.numel() // (1 if placements[name].is_replicate() else tp)
        for name, parameter in model.named_parameters()
    )


def divided_dim(name: str, parameter: Tensor, plan: dict[str, str]) -> int | None:
    """Return along which dim a `tp_plan` divides a parameter; None where each rank has all."""
    style = next((style for glob, style in plan.items() if fnmatchcase(name, glob)), "replicate")
    if style == "replicate":
        return None
    return parameter.ndim - 1 if style == "row" else 0


def _distributed(parameter: nn.Parameter, tp: DeviceMesh, placement: Placement) -> nn.Parameter:
    shape = list(parameter.shape)
    if isinstance(placement, Shard):
        shape[placement.dim] //= tp.size()
    tensor = DTensor.from_local(
        torch.empty(shape, dtype=parameter.dtype, device="meta"),
        tp,
        [placement],
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def _part(parameter: Tensor) -> Tensor:
    """Return this rank's part of a parameter as a plain tensor."""
    tensor = cast(DTensor, parameter)
    # What is whole on each rank has met only some of the tokens or heads.
    placements = [Partial() if p.is_replicate() else p for p in tensor.placements]
    return tensor.to_local(grad_placements=placements)


def _own_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the parameters that a module's forward reads itself: the holder, and the name there.

    A ParameterDict is never called.
    """
    containers = [c for c in module.children() if isinstance(c, nn.ParameterDict)]
    for holder in () if isinstance(module, nn.ParameterDict) else (module, *containers):
        for name, parameter in holder._parameters.items():
            if parameter is not None:
                yield holder, name


def _show_parts(module: nn.Module) -> None:
    """Let a module's forward see this rank's parts in place of its parameters.

    Each module for itself, as it is called: FSDP gathers submodules of other precision later, and
    recomputation calls only some of them.
    """

    def show(*_: Any) -> None:
        for holder, name in _own_parameters(module):
            # What lies in __dict__ is found first.
            holder.__dict__[name] = _part(holder.get_parameter(name))

    def hide(*_: Any) -> None:
        for holder, name in _own_parameters(module):
            holder.__dict__.pop(name, None)

    module.register_forward_pre_hook(show)
    module.register_forward_hook(hide, always_call=True)


def _gather_tokens(branch: nn.Module, group: dist.ProcessGroup) -> None:
    """Give all tokens to a mixer or an FFN, which has some of the heads or channels."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return gather(args[0], TIME, group), *args[1:]

    def after(_: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        if isinstance(result, tuple):
            y, state = result
            return reduce_scatter(y, TIME, group), state
        return reduce_scatter(result, TIME, group)

    branch.register_forward_pre_hook(before)
    branch.register_forward_hook(after)


def _tell_where(stack: nn.Module, group: dist.ProcessGroup) -> None:
    """Tell a stack which positions are here."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, ctx, *more = args
        start, length = group.rank() * x.shape[TIME], x.shape[TIME]
        here: Context = replace(ctx, here=slice(start, start + length))
        return x, here, *more

    stack.register_forward_pre_hook(before)


def _divide_embedding(embedding: nn.Embedding, group: dist.ProcessGroup) -> None:
    """Look ids up where they are: each rank has some of the vocabulary, and keeps some tokens."""
    rows = embedding.num_embeddings // group.size()
    elsewhere: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        ids = args[0] - group.rank() * rows
        elsewhere.append((ids < 0) | (ids >= rows))
        return (ids.masked_fill(elsewhere[-1], 0),)

    def after(_: nn.Module, args: Any, x: Tensor) -> Tensor:
        return reduce_scatter(x.masked_fill(elsewhere.pop()[..., None], 0), TIME, group)

    embedding.register_forward_pre_hook(before)
    embedding.register_forward_hook(after)


def _divide_head(head: Head, vocab_size: int, group: dist.ProcessGroup) -> None:
    """Give all tokens to the head, which has some of the vocabulary."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, tied, *more = args
        return gather(x, TIME, group), None if tied is None else _part(tied), *more

    def after(_: nn.Module, args: Any, result: Tensor) -> Tensor:
        is_loss = result.dim() == 0
        return result if is_loss else gather(result, -1, group)

    def add(x: Tensor) -> Tensor:
        dist.all_reduce(x, group=group)
        return x

    def largest(x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
        return x

    head.vocabulary = VocabularyPart(group.rank() * (vocab_size // group.size()), add, largest)
    head.register_forward_pre_hook(before)
    head.register_forward_hook(after)
