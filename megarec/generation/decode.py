"""Generate text: prompts in pieces, then one token at a time, all with the recurrent state."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megarec.config.model import ModelConfig
from megarec.errors import UserError
from megarec.models.backbone import Backbone
from megarec.models.context import Context
from megarec.models.halting import Halting
from megarec.models.looped import LATENT, Looped
from megarec.models.state import State

PREFILL_TOKENS = 1024
"""Prompts are read in pieces of this length, so that memory does not grow with the prompt."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the most likely one.

    Attributes:
        temperature: divides the logits.
        top_k: keep only so many most likely tokens (None: all).
        top_p: keep the fewest tokens whose probabilities add up to this (1: all).
        seed: of the random draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.temperature < 0:
            problems.append(f"temperature={self.temperature}: expected 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k={self.top_k}: expected 1 or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p}: expected a number in (0, 1]")
        if problems:
            raise UserError(*problems)


@torch.no_grad()
def generate(
    model: Backbone,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eod_id: int | None = None,
    num_recurrences: int | None = None,
    halting: Halting | None = None,
    warm_start: bool = False,
) -> list[list[int]]:
    """Continue a batch of prompts of any lengths; a row's result does not depend on the others.

    Args:
        model: in eval mode on its device.
        prompts: token ids, at least one a prompt.
        max_new_tokens: generated for each prompt at most.
        sampling: greedy by default.
        eod_id: ends a row; it is not part of the result. None: rows run to max_new_tokens.
        num_recurrences: of a looped stack, at most; prompts are read with so many. None: as the
            model's config says.
        halting: a rule by which generated tokens stop before that, and the count of how often they
            iterated. Nothing is saved where the model's cache is `full`.
        warm_start: let each generated token begin where the iteration of the one before it ended
            (continuous compute, arXiv 2502.05171, section 6.3).

    Returns:
        The new token ids of each prompt.

    Raises:
        UserError: no prompt, an empty prompt, a token id outside the vocabulary, more tokens than
            the model's `max_seq_len`, or options of a looped stack where there is none.
    """
    check(prompts, max_new_tokens, model.config)
    if warm_start and not isinstance(model.stack, Looped):
        raise UserError("warm_start: model.stack is not looped; leave it out")
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    logits_BV, state = _prefill(model, prompts, num_recurrences, warm_start)
    ctx = Context(num_recurrences=num_recurrences, halting=halting)
    rows: list[list[int]] = [[] for _ in prompts]
    running = rows
    for count in range(1, max_new_tokens + 1):
        next_B = choose(logits_BV, sampling, generator)
        kept = [i for i, token in enumerate(next_B.tolist()) if token != eod_id]
        running, next_B = [running[i] for i in kept], next_B[kept]
        for row, token in zip(running, next_B.tolist(), strict=True):
            row.append(token)
        if not running or count == max_new_tokens:
            break
        if len(kept) < len(logits_BV):
            state = {key: x[kept] for key, x in state.items()}
        logits_BV, state = model.step(next_B.to(logits_BV.device), state, ctx=ctx)
    return rows


def choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Choose a token id for each row of logits (B, V); returns int64 (B,) on the CPU."""
    logits_BV = logits_BV.cpu()
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / sampling.temperature
    sorted_BV, order_BV = logits_BV.sort(descending=True)
    if sampling.top_k is not None:
        sorted_BV[:, sampling.top_k :] = -torch.inf
    probability_BV = sorted_BV.softmax(-1)
    # Drop a token when those before it already reach top_p: the first one always stays.
    before_BV = probability_BV.cumsum(-1) - probability_BV
    probability_BV[before_BV >= sampling.top_p] = 0
    choice_B1 = torch.multinomial(probability_BV, 1, generator=generator)
    return order_BV.gather(1, choice_B1)[:, 0]


def _prefill(
    model: Backbone,
    prompts: Sequence[Sequence[int]],
    num_recurrences: int | None = None,
    warm_start: bool = False,
) -> tuple[Tensor, State]:
    """Read the prompts, padded on the left behind a reset: padding never enters the state."""
    device = model.embedding.weight.device
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths_B.max())
    ids_BT = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    whole = Context.left_padded(lengths_B.to(device), longest)
    whole = replace(whole, num_recurrences=num_recurrences)
    state = model.init_state(len(prompts), num_recurrences)
    if warm_start:
        embedding = model.embedding.weight
        state[LATENT] = embedding.new_zeros(len(prompts), embedding.shape[1])
    for start in range(0, longest, PREFILL_TOKENS):
        piece = slice(start, start + PREFILL_TOKENS)
        x_BTD, state = model.features(ids_BT[:, piece], whole.narrow(piece), state)
    return model.head(x_BTD[:, -1], model.embedding.weight), state


def check(prompts: Sequence[Sequence[int]], max_new_tokens: int, config: ModelConfig) -> None:
    """Raise UserError, all problems at once, unless a model can continue these prompts."""
    vocab_size, longest = config.vocab_size, config.max_seq_len
    problems = [] if prompts else ["generate: no prompt was given"]
    for row, prompt in enumerate(prompts):
        if not prompt:
            problems.append(f"prompt {row}: empty; give at least one token (the EOD id, say)")
        elif max(prompt) >= vocab_size or min(prompt) < 0:
            problems.append(f"prompt {row}: token ids must be in [0, {vocab_size})")
        elif longest is not None and len(prompt) + max_new_tokens > longest:
            problems.append(
                f"prompt {row}: {len(prompt)} tokens and max_new_tokens={max_new_tokens} exceed "
                f"the model's max_seq_len={longest}; shorten one of them"
            )
    if problems:
        raise UserError(*problems)
