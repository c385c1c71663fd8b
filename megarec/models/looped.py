"""The looped stack (recurrent depth): prelude, a core that iterates on a latent state, coda."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megarec.config.stack import LoopedConfig
from megarec.errors import UserError
from megarec.models.context import Context, positions
from megarec.models.depth_cache import DepthCache
from megarec.models.halting import Iteration
from megarec.models.init import Initializer
from megarec.models.latent import random_latent
from megarec.models.loop_metrics import LoopMetrics
from megarec.models.stack import Passed, Run, Stack, Surroundings, run_once
from megarec.models.state import State, prefixed

POSITION = "core.pos"
"""Key of the next token's position in its document, int64 (B,)."""

LATENT = "core.latent"
"""Key of the last latent state of the last token, (B, D). A state that holds it asks for a warm
start: the next token that comes alone begins from there, and the state after it holds its own."""

Inject = Callable[[int | Tensor, Tensor], Tensor]
"""(number of the recurrence, one for all or int64 (...), latent state) -> what the core reads."""


class Looped(Stack):
    """The recurrent-depth stack of LoopedConfig (arXiv 2502.05171, section 3, and relatives).

    Its own parameters, beside the blocks': `adapter` (D, 2 D), columns of the latent state first;
    `step_embedding` (steps, D); those of `update` and `halt`.

    Shapes: ... is (B, T) of whole sequences, or (B,) of one token; D d_model.
    """

    def __init__(self, config: LoopedConfig, num_layers: int, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.core = config.core_blocks
        self.prelude, self.coda = range(self.core.start), range(self.core.stop, num_layers)
        concat, steps = config.inject == "concat", config.num_step_embeddings
        self.adapter = Adapter(d_model) if concat else None
        self.step_embedding = StepEmbedding(steps, d_model) if steps else None
        self.update = config.update.build(d_model) if config.update is not None else None
        self.halt = config.halt.build(d_model) if config.halt is not None else None
        self.seen = LoopMetrics()

    def forward(
        self,
        x: Tensor,
        ctx: Context,
        around: Surroundings,
        state: State | None,
        keep_state: bool,
        layers: range | None = None,
    ) -> Passed:
        """Run prelude, loop and coda; see Stack.

        Raises:
            UserError: a number of recurrences below 1, or one that the state is not made for.
        """
        if layers is not None and not set(self.core) <= set(layers):
            # A stage of a pipeline without the core.
            return Passed(*run_once(layers, x, around.run, state, keep_state))
        e, after = self.enter(x, around, state, keep_state, layers)
        position = next_positions(e, ctx, state)
        iteration = self._start(ctx)
        latent, core_state = self._loop(e, position, ctx, around, iteration, state, keep_state)
        exits = iteration.exits()
        outputs = [exit for exit, _ in exits] or [iteration.output(latent)]
        left = [self.leave(output, around, state, keep_state, layers) for output in outputs]
        x, coda_state = left[-1]
        if keep_state:
            after |= core_state | coda_state
            after[POSITION] = (position if position.dim() == 1 else position[:, -1]) + 1
            if state is not None and LATENT in state:
                after[LATENT] = latent if latent.dim() == 2 else latent[:, -1]
        weighted = [(x, w) for (x, _), (_, w) in zip(left, exits, strict=True)] if exits else []
        return Passed(x, after, weighted, iteration.penalty())

    def _loop(
        self,
        e: Tensor,
        position: Tensor,
        ctx: Context,
        around: Surroundings,
        iteration: Iteration,
        state: State | None,
        keep_state: bool,
    ) -> tuple[Tensor, State]:
        """Iterate; returns the last latent state (..., D) and the state that the core keeps."""
        num_recurrences = self.num_recurrences(ctx)
        backprop = self.config.backprop if self.training else None
        num_free = max(num_recurrences - (backprop or num_recurrences), 0)
        cache = DepthCache(self.config.cache, self.core, state, num_recurrences)
        # What no token needs is left out in decoding alone: elsewhere all ranks must do the same.
        may_stop = e.dim() == 2 and self.config.cache.type != "full"
        latent, inject = self.initial_latent(e, position, ctx, state), self.injection(e, position)
        rows_B = torch.ones(len(e), dtype=torch.bool, device=e.device)

        @torch.no_grad()
        def readout(latent: Tensor) -> Tensor:
            return around.readout(self.leave(latent, around, state, False)[0])

        for i in range(num_recurrences):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= num_free):
                before = cache.before(i)
                new, states = self.recurrence(i, latent, inject, around.run, before, keep_state)
                if keep_state:
                    cache.write(i, states, rows_B)
                if self.training:
                    self.seen.see(i, num_recurrences, latent, new)
                latent = iteration.advance(latent, new, readout)
            if may_stop and iteration.running is not None:
                rows_B = iteration.running
                if not rows_B.any():
                    break
        if self.training:
            self.seen.count(iteration.num_steps)
        if ctx.halting is not None:
            always = torch.full_like(position, num_recurrences)
            ctx.halting.count(always if iteration.num_steps is None else iteration.num_steps)
        if not keep_state:
            return latent, {}
        cache.fill(around.inherit, e.shape[1] if e.dim() == 3 else 1)
        return latent, cache.state()

    def enter(
        self,
        x: Tensor,
        around: Surroundings,
        state: State | None,
        keep_state: bool,
        layers: range | None = None,
    ) -> tuple[Tensor, State]:
        """Run the prelude, or what `layers` has of it, on embeddings; returns e and its state."""
        return run_once(_common(self.prelude, layers), x, around.run, state, keep_state)

    def recurrence(
        self,
        i: int | Tensor,
        latent: Tensor,
        inject: Inject,
        run: Run,
        before: Sequence[State] | None,
        keep_state: bool,
    ) -> tuple[Tensor, list[State]]:
        """Make recurrence i; returns the next latent state and the states of the core's blocks.

        Args:
            i: its number, one for all tokens or int64 (...).
            latent: the latent state before it, (..., D).
            inject: see `injection`.
            run: runs a block.
            before: the states that the core's blocks go on from; None at a start.
            keep_state: return their states.
        """

        def recurrence(latent: Tensor) -> tuple[Tensor, list[State]]:
            u, states = inject(i, latent), []
            for j, index in enumerate(self.core):
                u, block_state = run(index, u, None if before is None else before[j])
                states += [block_state] if keep_state else []
            return u if self.update is None else self.update(u, latent), states

        if self.recompute and torch.is_grad_enabled():
            return checkpoint(recurrence, latent, use_reentrant=False)
        return recurrence(latent)

    def num_recurrences(self, ctx: Context) -> int:
        """Return how often to iterate: as `ctx` says, else in training as drawn.

        Raises:
            UserError: a number below 1.
        """
        given, depth, draw = ctx.num_recurrences, self.config.depth, ctx.draw
        if given is not None:
            if given < 1:
                raise UserError(f"num_recurrences={given}: expected at least 1")
            return given
        if not self.training or depth is None or draw is None:
            return self.config.num_recurrences
        step = draw.step if depth.per == "step" else draw.micro_batch
        return depth.draw(draw.seed, step, self.config.backprop)

    def _start(self, ctx: Context) -> Iteration:
        if ctx.halting is None or ctx.halting.config is None:
            return Iteration() if self.halt is None else self.halt.start()
        own = self.config.halt
        if own is not None and own.learned:
            raise UserError(
                f"halting={ctx.halting.config.type}: the model has learned when to stop "
                f"(stack.halt={own.type}); leave it out"
            )
        return ctx.halting.config.build(0).start()

    def initial_latent(
        self, e: Tensor, position: Tensor, ctx: Context, state: State | None
    ) -> Tensor:
        """Return s_0 of tokens (..., D), given e (..., D) and their positions (...)."""
        if ctx.latent is not None:
            return ctx.latent.to(e.dtype)
        if state is not None and LATENT in state and e.dim() == 2:
            return state[LATENT]
        if self.config.initial_state == "embedding":
            return e
        if self.config.initial_state == "zero":
            return torch.zeros_like(e)
        draw = ctx.draw
        seed = () if draw is None else (draw.seed, draw.step)
        samples_B = None if draw is None else draw.samples
        latent = random_latent(position, samples_B, e.shape[-1], self.config.initial_std, *seed)
        return latent.to(e.dtype)

    def injection(self, e: Tensor, position: Tensor) -> Inject:
        """Return what makes the core's input; what does not change with s is computed here."""
        fixed = e if self.config.inject == "add" else None
        if self.adapter is not None:
            fixed = self.adapter(e, slice(e.shape[-1], None))
        if self.config.step_signal == "sinusoid":
            wave = sinusoid(position, e.shape[-1]).to(e.dtype)
            fixed = wave if fixed is None else fixed + wave

        def inject(i: int | Tensor, latent: Tensor) -> Tensor:
            u = latent if self.adapter is None else self.adapter(latent, slice(latent.shape[-1]))
            u = u if fixed is None else u + fixed
            if self.step_embedding is not None:
                u = u + self.step_embedding(i)
            elif self.config.step_signal == "sinusoid":
                number = torch.as_tensor(i + 1, device=u.device)
                u = u + sinusoid(number, u.shape[-1]).to(u.dtype)
            return u

        return inject

    def leave(
        self,
        latent: Tensor,
        around: Surroundings,
        state: State | None,
        keep_state: bool,
        layers: range | None = None,
    ) -> tuple[Tensor, State]:
        """Run the coda, or what `layers` has of it, on latent states.

        Returns what the last norm reads, and its state.
        """
        x = around.norm(latent) if self.config.norm_core_output else latent
        return run_once(_common(self.coda, layers), x, around.run, state, keep_state)

    def init_state(
        self,
        blocks: dict[int, State],
        batch_size: int,
        device: torch.device,
        num_recurrences: int | None,
    ) -> State:
        """Return the state before the first token: the core's once a slot; see Stack."""
        once = {i: state for i, state in blocks.items() if i not in self.core}
        state = super().init_state(once, batch_size, device, num_recurrences)
        slots = self.config.cache.num_slots(num_recurrences or self.config.num_recurrences)
        for j, i in enumerate(self.core):
            repeated = {key: torch.stack([x] * slots, 1) for key, x in blocks[i].items()}
            state |= prefixed(repeated, f"core.{j}.")
        state[POSITION] = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return state

    def init_weights(self, init: Initializer) -> None:
        """Draw adapter and step embeddings with std; see Stack."""
        if self.adapter is not None:
            init.normal(self.adapter.weight, init.std)
        if self.step_embedding is not None:
            init.normal(self.step_embedding.weight, init.std)
        for part in (self.update, self.halt):
            if part is not None:
                part.init_weights(init)

    def metrics(self) -> dict[str, float]:
        """Return what LoopMetrics has seen; see Stack."""
        return self.seen.take()


class Adapter(nn.Linear):
    """A linear map of [s; e] that takes the two apart, so that e's share is computed once."""

    def __init__(self, d_model: int) -> None:
        super().__init__(2 * d_model, d_model, bias=False)

    def forward(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        """Map some columns of [s; e], by default all, (..., columns) -> (..., D)."""
        return F.linear(x, self.weight[:, columns])


class StepEmbedding(nn.Embedding):
    """A vector for each recurrence; the last one serves those beyond it too."""

    def forward(self, i: int | Tensor) -> Tensor:
        """Return the vector (D,) of recurrence i, or those (..., D) of each."""
        last = self.num_embeddings - 1
        if isinstance(i, int):
            # A copy: no hook of torch takes a view of a parameter that was made without gradients.
            return self.weight[min(i, last)].clone()
        return self.weight[i.clamp(max=last)]


def sinusoid(number: Tensor, d_model: int) -> Tensor:
    """Return sin and cos of whole numbers (...), alternating over d_model channels: (..., d_model).

    Channel pair j turns by 10000^(-2j / d_model) (arXiv 1706.03762, section 3.5), in float32.
    """
    pair_C = torch.arange(d_model, device=number.device)
    rate_C = 10_000.0 ** (-(pair_C - pair_C % 2) / d_model)
    angle = number[..., None] * rate_C
    return torch.where(pair_C % 2 == 0, angle.sin(), angle.cos())


def next_positions(x: Tensor, ctx: Context, state: State | None) -> Tensor:
    """Return the position in its document of each token in x, int64 (B, T) or (B,)."""
    if state is None:
        first_B = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    else:
        first_B = state[POSITION]
    if x.dim() == 2:
        return first_B
    here = ctx.here or slice(0, x.shape[1])
    resets = None if ctx.resets is None else ctx.resets[:, : here.stop]
    return positions(here.stop, resets, first_B)[:, here]


def _common(blocks: range, layers: range | None) -> range:
    """Return the blocks that are among `layers` (None: all)."""
    if layers is None:
        return blocks
    return range(max(blocks.start, layers.start), min(blocks.stop, layers.stop))
