"""The backbone: embedding, a stack of blocks, final norm, head."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from megarec.config.model import ModelConfig
from megarec.config.stack import LoopedConfig
from megarec.errors import UserError
from megarec.models.block import Block
from megarec.models.context import Context
from megarec.models.head import IGNORE_INDEX, Criterion, Head
from megarec.models.init import Assign, Initializer, assign_whole
from megarec.models.looped import Looped
from megarec.models.norm import RMSNorm
from megarec.models.stack import Passed, Sequential, Stack, Surroundings
from megarec.models.state import State


@dataclass(frozen=True)
class Part:
    """What a stage of a pipeline runs.

    Attributes:
        layers: global indices of its blocks; a looped core is in it as a whole or not at all.
        first: it embeds tokens; other stages are given what the stage before returned.
        last: it ends in the last norm and the head.
    """

    layers: range
    first: bool
    last: bool


class Backbone(nn.Module):
    """A causal language model over any pattern of blocks.

    In a pipeline it holds what the stages of this rank need (see `keep`).
    Shapes: B batch, T time, D d_model, V vocabulary.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        # Keyed by the global index: a pipeline stage holds some of the blocks, under their names.
        self.blocks = nn.ModuleDict(
            {
                str(i): Block(block, config.d_model, config.norm)
                for i, block in enumerate(config.layers)
            }
        )
        self.stack = build_stack(config)
        self.norm = RMSNorm(config.d_model, config.norm.eps)
        self.head = Head(config.head, config.vocab_size, config.d_model)

    def modules_of(self, part: Part) -> dict[str, nn.Module]:
        """Return the modules that a part of the model needs, by name.

        A module that several parts need is one module in each: tied embeddings, say.
        """
        stack, runs_core, norms_core = self.config.stack, True, False
        if isinstance(stack, LoopedConfig):
            runs_core = set(stack.core_blocks) <= set(part.layers)
            norms_core = runs_core and stack.norm_core_output
        needed = {
            **{f"blocks.{i}": True for i in part.layers},
            "embedding": part.first or (part.last and self.config.head.tie_embeddings),
            "stack": runs_core,
            "norm": part.last or norms_core,
            "head": part.last,
        }
        return {name: self.get_submodule(name) for name, wanted in needed.items() if wanted}

    def keep(self, parts: Iterable[Part]) -> None:
        """Let go of all that no part needs; what is left runs by `forward_part` only."""
        needed = {name for part in parts for name in self.modules_of(part)}
        for i in [i for i, _ in self.layers() if f"blocks.{i}" not in needed]:
            del self.blocks[i]
        for name in {"embedding", "norm", "head"} - needed:
            self.register_module(name, None)
        if "stack" not in needed:
            self.stack = Sequential(self.config.num_layers)

    def block(self, i: int) -> Block:
        """Return the block of a global index."""
        return cast(Block, self.blocks[str(i)])

    def layers(self) -> Iterator[tuple[str, Block]]:
        """Yield the global index (as text) and the block of each layer that is here."""
        yield from cast(Iterable[tuple[str, Block]], self.blocks.items())

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        ctx: Context | None = None,
        state: State | None = None,
        return_state: bool = False,
        criterion: Criterion | None = None,
        num_recurrences: int | None = None,
    ) -> Any:
        """Run the model on whole sequences.

        Args:
            input_ids: int64 (B, T).
            labels: int64 (B, T), the token to predict at each position (already shifted), -100
                for none.
            ctx: document boundaries, and more; without it each row is one document.
            state: carried state of the tokens before (see `init_state`).
            return_state: append the state after the last token to the result.
            criterion: computes the loss in place of the cross-entropy; see Head.
            num_recurrences: how often a looped stack iterates, in place of what `ctx` says.

        Returns:
            logits (B, T, V), float32 at least; with labels, the pair (loss_sum, num_tokens): the
            sum of the tokens' losses in nats, and their number, both scalars.

        Raises:
            UserError: `num_recurrences` does not fit the stack, or the state.
        """
        ctx = self._context(ctx, num_recurrences)
        passed = self._pass(input_ids, ctx, state, return_state)
        if labels is None:
            results: list[Any] = [self._read(passed.x)]
        else:
            kept_BT = labels != IGNORE_INDEX
            results = [self._loss(passed, labels, kept_BT, criterion), kept_BT.sum()]
        if return_state:
            results.append(passed.state)
        return results[0] if len(results) == 1 else tuple(results)

    def forward_part(
        self,
        part: Part,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        ctx: Context,
    ) -> Tensor:
        """Run what a stage of a pipeline runs of a training or evaluation pass.

        Args:
            part: which part of the model.
            x: ids int64 (B, T) of the first part, else what the part before returned.
            labels: as for `forward`; of the last part.
            ctx: of the whole rows, as for `forward`.

        Returns:
            x (B, T, D) for the part after; of the last one the summed loss, a scalar.
        """
        if part.first:
            x = self.embed(x)
        passed = self.stack(x, ctx, self.surroundings(ctx), None, False, part.layers)
        if not part.last:
            return cast(Tensor, passed.x)
        if labels is None:
            raise ValueError("labels: got None, expected them for the last part")
        return self._loss(passed, labels, labels != IGNORE_INDEX, None)

    def features(
        self, input_ids: Tensor, ctx: Context | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Return what the head reads, (B, T, D), and the state after the last token."""
        passed = self._pass(input_ids, self._context(ctx, None), state, True)
        return self.norm(passed.x), passed.state

    def step(
        self,
        input_ids_B: Tensor,
        state: State,
        *,
        ctx: Context | None = None,
        num_recurrences: int | None = None,
    ) -> tuple[Tensor, State]:
        """Decode one token: ids int64 (B,) and the state -> logits (B, V) and the next state.

        Of `ctx` counts how a looped stack is to run; see `forward` for the rest.
        """
        passed = self._pass(input_ids_B, self._context(ctx, num_recurrences), state, True)
        return self._read(passed.x), passed.state

    def _context(self, ctx: Context | None, num_recurrences: int | None) -> Context:
        ctx = ctx or Context()
        if num_recurrences is not None:
            ctx = replace(ctx, num_recurrences=num_recurrences)
        if isinstance(self.stack, Looped):
            return ctx
        if ctx.num_recurrences is not None:
            raise UserError(
                f"num_recurrences={ctx.num_recurrences}: model.stack is not looped; leave it out"
            )
        if ctx.halting is not None:
            raise UserError("halting: model.stack is not looped; leave it out")
        return ctx

    def _pass(
        self, input_ids: Tensor, ctx: Context, state: State | None, keep_state: bool
    ) -> Passed:
        """Run all but the last norm and the head, on sequences (B, T) or a token (B,)."""
        return self.stack(self.embed(input_ids), ctx, self.surroundings(ctx), state, keep_state)

    def surroundings(self, ctx: Context) -> Surroundings:
        """Return what a stack may use of the model, its blocks running in a context."""

        def run(i: int, x: Tensor, state: State | None) -> tuple[Tensor, State]:
            block = self.block(i)
            try:
                if x.dim() == 2:
                    return block.step(x, state or {})
                return block(x, ctx, state)
            except ArithmeticError as error:
                raise type(error)(f"layer {i}: {error}") from error

        return Surroundings(run, self._inherit, self.norm, self._read)

    def _read(self, x: Tensor, *options: Any, **more: Any) -> Tensor:
        """Return what the head makes of x (..., D): see Head.forward for what else it takes."""
        tied = self.embedding.weight if self.config.head.tie_embeddings else None
        return cast(Tensor, self.head(self.norm(x), tied, *options, **more))

    def _loss(
        self, passed: Passed, labels: Tensor, kept_BT: Tensor, criterion: Criterion | None
    ) -> Tensor:
        """Return the summed loss, with what a stack adds to it in training."""
        if passed.exits and criterion is not None:
            raise UserError("stack.halt=exit_gate: has a loss of its own; it cannot be distilled")
        if passed.exits:
            losses = [self._read(x, labels, token_weights=weight) for x, weight in passed.exits]
            loss = torch.stack(losses).sum()
        else:
            loss = self._read(passed.x, labels, criterion)
        if passed.penalty is not None and self.training:
            loss = loss + (passed.penalty * kept_BT).sum()
        return loss

    def _inherit(self, i: int, before: State | None, deeper: State, num_tokens: int) -> State:
        block = self.block(i)
        if block.mixer is None:
            return {}
        if before is None:
            batch_size = len(next(iter(deeper.values())))
            before = block.init_state(batch_size, self.embedding.weight.device)
        return block.mixer.inherit(before, deeper, num_tokens)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return what the stack reads of ids (...): (..., D)."""
        x = self.embedding(input_ids)
        scale = self.config.embedding_scale
        return x if scale == 1 else x * scale

    def init_state(self, batch_size: int, num_recurrences: int | None = None) -> State:
        """Return the state before the first token.

        `num_recurrences` is the largest number of recurrences to come, by default the config's.
        """
        device = self.embedding.weight.device
        blocks = {int(name): block.init_state(batch_size, device) for name, block in self.layers()}
        return self.stack.init_state(blocks, batch_size, device, num_recurrences)

    def constrain_(self) -> None:
        """Bring parameters back to where they must be; called after each optimizer step."""
        for _, block in self.layers():
            if block.mixer is not None:
                block.mixer.constrain_()

    def metrics(self) -> dict[str, float]:
        """Return what stack and mixers log since the last call, of mixers the largest."""
        largest = self.stack.metrics()
        for _, block in self.layers():
            for name, value in ({} if block.mixer is None else block.mixer.metrics()).items():
                largest[name] = max(value, largest.get(name, value))
        return largest

    @torch.no_grad()
    def init_weights(self, seed: int, assign: Assign = assign_whole) -> None:
        """Initialise every parameter; `assign` places a whole tensor into a (sharded) parameter."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.named_parameters()}
        init = Initializer(self.config, names, seed, assign)
        if self.embedding is not None:
            init.normal(self.embedding.weight, init.std)
        for _, block in self.layers():
            block.init_weights(init)
        for part in (self.stack, self.norm, self.head):
            if part is not None:
                part.init_weights(init)


def build_stack(config: ModelConfig) -> Stack:
    """Build what the stack is made of, beside the blocks."""
    if isinstance(config.stack, LoopedConfig):
        return Looped(config.stack, config.num_layers, config.d_model)
    return Sequential(config.num_layers)


def build_model(
    config: ModelConfig, *, seed: int = 0, device: torch.device | str = "cpu"
) -> Backbone:
    """Build a model in float32 with its initial weights (none on the meta device).

    Args:
        config: the model section.
        seed: of the initial weights, which depend on nothing else.
        device: where it lives.
    """
    with torch.device(device):
        model = Backbone(config)
    if torch.device(device).type != "meta":
        model.init_weights(seed)
    return model
