"""The diffusion-forcing sampler: many tokens of a text iterate at once, each further on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from megarec.config.base import Fraction, NonNegativeFloat, PositiveInt, StrictModel
from megarec.config.stack import CacheConfig
from megarec.errors import UserError
from megarec.generation.decode import PREFILL_TOKENS, Sampling, check, choose
from megarec.models.backbone import Backbone
from megarec.models.context import Context, Draw
from megarec.models.depth_cache import DepthCache
from megarec.models.init import seed_from
from megarec.models.looped import POSITION, Looped, next_positions
from megarec.models.state import State

ONE_SLOT = CacheConfig(type="modulo", slots=1)


class DiffusionForcingConfig(StrictModel):
    """How the sampler refines and freezes tokens (arXiv 2510.14961, section 4).

    A round gives every open token `inner_recurrence` recurrences, predicts all tokens behind them
    anew, and opens `headway` more, the first as predicted and the others at random; at most
    `max_wavefront` are open. Tokens freeze from the front on: each once it is what the frozen one
    before it predicts and, under `freeze: latent`, a round changes its latent state s by less than
    `threshold` |s|. After as many recurrences as plain decoding makes, no longer than it is this
    token, it need not wait for that; under `freeze: fixed` it freezes then, and not before.

    `ema_embeds` is the share of the last round's prelude output in this one's. `state_noise_mixing`
    is the share of a new initial state in a latent state, divided by 1 + its recurrences so far.
    """

    inner_recurrence: PositiveInt = 4
    freeze: Literal["latent", "fixed"] = "latent"
    threshold: NonNegativeFloat = 0.03
    headway: PositiveInt = 1
    max_wavefront: PositiveInt = 128
    ema_embeds: Fraction = 0.1
    state_noise_mixing: Fraction = 0.0


@dataclass(frozen=True)
class Continuation:
    """What the sampler made of a prompt, and what it took beside reading the prompt.

    Attributes:
        ids: the new tokens.
        core_passes: runs of the core, one after the other.
        token_recurrences: tokens in all those runs.
    """

    ids: list[int]
    core_passes: int
    token_recurrences: int


@torch.no_grad()
def diffusion_forcing(
    model: Backbone,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    config: DiffusionForcingConfig | None = None,
    sampling: Sampling | None = None,
    eod_id: int | None = None,
    num_recurrences: int | None = None,
) -> Continuation:
    """Continue one prompt with a looped model.

    The text that has frozen is a state, the open tokens behind it a wave that passes over the
    text. Where all tokens converge before they freeze, the result is that of plain decoding.

    Args:
        model: in eval mode on its device, with any mixers. Whatever the cache of its config, the
            core's state is kept of a token's last recurrence alone. Nor is a halting rule of its
            config used.
        prompt: token ids, at least one.
        max_new_tokens: generated at most.
        config: see there.
        sampling: greedy by default. What is random hangs on the seed and a token's position alone,
            so that tokens still can freeze.
        eod_id: ends the text; it is not part of the result.
        num_recurrences: of the prompt's tokens, and those after which an open one may freeze though
            its latent state still changes; None: as the model's config says.

    Raises:
        UserError: as for `generate`, or a model that is not looped or learned when to stop.
    """
    check([prompt], max_new_tokens, model.config)
    wave = Wave(model, config or DiffusionForcingConfig(), sampling or Sampling(), num_recurrences)
    wave.read(prompt)
    ids = wave.ids[:max_new_tokens]
    while len(ids) < max_new_tokens and eod_id not in ids:
        ids += wave.advance(max_new_tokens - len(ids))
    if eod_id in ids:
        ids = ids[: ids.index(eod_id)]
    return Continuation(ids, wave.core_passes, wave.token_recurrences)


@dataclass(frozen=True)
class Refined:
    """Open tokens as far as they have come.

    Attributes:
        ids_1T: what was read of them.
        e_1TD: what the core reads of the prelude.
        latent_1TD: their latent states.
        last_1TD: the latent states before the last recurrence.
        num_steps_1T: how many recurrences were made at their positions, int64.
        num_same_1T: how many of them since the token there last changed.
    """

    ids_1T: Tensor
    e_1TD: Tensor
    latent_1TD: Tensor
    last_1TD: Tensor
    num_steps_1T: Tensor
    num_same_1T: Tensor

    def narrow(self, piece: slice) -> "Refined":
        """Return some of the tokens."""
        return Refined(*(getattr(self, field.name)[:, piece] for field in fields(self)))

    def undone(self) -> "Refined":
        """Return the tokens as they were before their last recurrence."""
        return replace(self, latent_1TD=self.last_1TD, num_steps_1T=self.num_steps_1T - 1)


class Wave:
    """The open tokens, and the model's state after the text before them.

    Shapes: T tokens of a batch of 1, D d_model.

    Attributes:
        ids: the open tokens. The first is final, the others are what is predicted so far.
        core_passes: see Continuation.
        token_recurrences: see Continuation.
    """

    def __init__(
        self,
        model: Backbone,
        config: DiffusionForcingConfig,
        sampling: Sampling,
        num_recurrences: int | None,
    ) -> None:
        self.model, self.config, self.sampling = model, config, sampling
        self.stack = _looped(model)
        self.num_recurrences = self.stack.num_recurrences(Context(num_recurrences=num_recurrences))
        self.around = model.surroundings(Context())
        self.state = model.init_state(1, num_recurrences=1)
        weight = model.embedding.weight
        none_1TD = weight.new_zeros(1, 0, weight.shape[1])
        none_1T = none_1TD[..., 0].long()
        self.refined = Refined(none_1T, none_1TD, none_1TD, none_1TD, none_1T, none_1T)
        self.ids: list[int] = []
        self.guesses = torch.Generator().manual_seed(sampling.seed)
        self.core_passes = self.token_recurrences = self.num_rounds = 0

    def read(self, prompt: Sequence[int]) -> None:
        """Freeze a prompt, and open the token after it."""
        for start in range(0, len(prompt), PREFILL_TOKENS):
            piece = prompt[start : start + PREFILL_TOKENS]
            x_1TD, _, self.state = self._run(piece, self.refined, self.num_recurrences)
        self.ids = self._choose(x_1TD[:, -1:], len(prompt))
        self.core_passes = self.token_recurrences = 0

    def advance(self, most: int) -> list[int]:
        """Make a round; returns the tokens, `most` at most, that are final from now on."""
        ids, before = self.ids[: min(most, self.config.max_wavefront)], self.refined
        x_1TD, after, _ = self._run(ids, before, self.config.inner_recurrence, refine=True)
        predicted = self._choose(x_1TD, int(self.state[POSITION]) + 1)
        count = self._num_frozen(ids, predicted, before, after)
        if count:
            # The round's state is that after all open tokens: these make their last step alone.
            _, _, self.state = self._run(ids[:count], after.narrow(slice(count)).undone(), 1)
        guesses = torch.randint(
            self.model.config.vocab_size, (self.config.headway - 1,), generator=self.guesses
        )
        self.ids = [ids[0], *predicted, *guesses.tolist()][count:]
        self.refined = after.narrow(slice(count, None))
        self.num_rounds += 1
        return predicted[:count]

    def _run(
        self, ids: Sequence[int], known: Refined, num_recurrences: int, refine: bool = False
    ) -> tuple[Tensor, Refined, State]:
        """Run the model on tokens behind the frozen text, from latent states as far as known.

        Returns:
            what the last norm reads (1, T, D), the tokens, and the state after them.
        """
        state, stack, old = self.state, self.stack, known.latent_1TD.shape[1]
        ids_1T = torch.tensor([list(ids)], device=known.e_1TD.device)
        e_1TD, after = stack.enter(self.model.embed(ids_1T), self.around, state, True)
        position_1T = next_positions(e_1TD, Context(), state)
        fresh_1TD = stack.initial_latent(e_1TD, position_1T, Context(), None)
        latent_1TD = torch.cat([known.latent_1TD, fresh_1TD[:, old:]], 1)
        num_steps_1T = F.pad(known.num_steps_1T, (0, len(ids) - old))
        num_same_1T = known.num_same_1T * (ids_1T[:, :old] == known.ids_1T)
        num_same_1T = F.pad(num_same_1T, (0, len(ids) - old)) + num_recurrences
        if refine:
            smooth_1TD = torch.lerp(e_1TD[:, :old], known.e_1TD, self.config.ema_embeds)
            e_1TD = torch.cat([smooth_1TD, e_1TD[:, old:]], 1)
        if refine and self.config.state_noise_mixing > 0:
            draw = Draw(self.sampling.seed, self.num_rounds, 0, torch.zeros_like(position_1T[:, 0]))
            noise_1TD = stack.initial_latent(e_1TD, position_1T, Context(draw=draw), None)
            share_1T1 = self.config.state_noise_mixing / (1 + num_steps_1T[..., None].to(e_1TD))
            latent_1TD = torch.lerp(latent_1TD, noise_1TD, share_1T1)
        cache = DepthCache(ONE_SLOT, stack.core, state, num_recurrences)
        inject, before = stack.injection(e_1TD, position_1T), cache.before(0)
        for i in range(num_recurrences):
            last_1TD = latent_1TD
            latent_1TD, states = stack.recurrence(
                num_steps_1T + i, latent_1TD, inject, self.around.run, before, True
            )
        cache.write(0, states, torch.ones(1, dtype=torch.bool, device=ids_1T.device))
        x_1TD, coda = stack.leave(latent_1TD, self.around, state, True)
        after |= cache.state() | coda | {POSITION: position_1T[:, -1] + 1}
        self.core_passes += num_recurrences
        self.token_recurrences += num_recurrences * len(ids)
        num_steps_1T = num_steps_1T + num_recurrences
        parts = (ids_1T, e_1TD, latent_1TD, last_1TD, num_steps_1T, num_same_1T)
        return x_1TD, Refined(*parts), after

    def _choose(self, x_1TD: Tensor, position: int) -> list[int]:
        """Choose the tokens that x predicts; the first of them stands at a position."""
        chosen = []
        for t, logits_1V in enumerate(self.around.readout(x_1TD)[0].cpu().split(1)):
            seed = seed_from("token", self.sampling.seed, position + t)
            generator = torch.Generator().manual_seed(seed)
            chosen += choose(logits_1V, self.sampling, generator).tolist()
        return chosen

    def _num_frozen(
        self, ids: Sequence[int], predicted: Sequence[int], before: Refined, after: Refined
    ) -> int:
        """Return how many of the open tokens freeze; see DiffusionForcingConfig."""
        done_T = after.num_same_1T[0] >= self.num_recurrences
        if self.config.freeze == "latent":
            old_TD, new_TD = before.latent_1TD[0], after.latent_1TD[0, : before.latent_1TD.shape[1]]
            dtype = torch.promote_types(new_TD.dtype, torch.float32)
            old_TD, new_TD = old_TD.to(dtype), new_TD.to(dtype)
            still_T = (new_TD - old_TD).norm(dim=-1) < self.config.threshold * new_TD.norm(dim=-1)
            done_T[: len(still_T)] |= still_T
        as_predicted = [a == b for a, b in zip(ids[1:], predicted, strict=False)]
        done_T[1:] &= torch.tensor(as_predicted, dtype=torch.bool, device=done_T.device)
        return int(done_T.long().cumprod(0).sum())


def _looped(model: Backbone) -> Looped:
    if not isinstance(model.stack, Looped):
        raise UserError("diffusion_forcing: model.stack is not looped; choose another sampler")
    halt = model.stack.config.halt
    if halt is not None and halt.learned:
        raise UserError(
            f"diffusion_forcing: the model has learned when to stop (stack.halt={halt.type}); "
            "choose another sampler"
        )
    return model.stack
