"""Looped attention models decoded one token, one recurrence at a time, from an explicit table.

Slow and obvious: every key and value that was ever computed stays in a list, and a function says
which recurrence's a later token looks up. No state, no cache, no batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from megarec.models import Backbone
from megarec.models.latent import random_latent

LookUp = Callable[[int, int], int]
"""(number of recurrences that an earlier token made, this recurrence) -> the one to look up."""


def every(made: int, i: int) -> int:
    """All tokens made all recurrences."""
    return i


def deepest(made: int, i: int) -> int:
    """The deepest recurrence up to this one."""
    return min(i, made - 1)


def modulo(slots: int) -> LookUp:
    """The last recurrence that wrote the slot, or where there is none, the last of all."""

    def look_up(made: int, i: int) -> int:
        in_slot = [j for j in range(made) if j % slots == i % slots]
        return max(in_slot, default=made - 1)

    return look_up


@dataclass
class Rule:
    """When one token stops: asked after each of its recurrences.

    `threshold` is that of the rule; for act 1 - eps. Both learned rules need the `unit` w s + b.
    """

    type: str
    threshold: float = 0.0
    patience: int = 1
    unit: Callable[[Tensor], Tensor] | None = None
    before: list[float] = field(default_factory=list)
    same: int = 0
    total: float = 0.0
    mixed: list[tuple[float, Tensor]] = field(default_factory=list)

    def stops(self, old: Tensor, new: Tensor, readout: Callable[[Tensor], Tensor]) -> bool:
        if self.type == "latent":
            length = math.dist(new.tolist(), [0.0] * len(new))
            return math.dist(new.tolist(), old.tolist()) / length < self.threshold
        if self.unit is not None:
            gate = 1 / (1 + math.exp(-float(self.unit(new))))
            if self.type == "exit_gate":
                self.total += (1 - self.total) * gate
                return self.total > self.threshold
            stop = self.total + gate > self.threshold
            self.mixed.append((1 - self.total if stop else gate, new))
            self.total += self.mixed[-1][0]
            return stop
        p, before = readout(new).softmax(-1).tolist(), self.before
        self.before = p
        if self.type == "kl":
            pairs = zip(before or [1 / len(p)] * len(p), p, strict=True)
            return sum(b * math.log(b / a) for b, a in pairs) < self.threshold
        if self.type == "entropy":
            return bool(before) and abs(entropy(p) - entropy(before)) < self.threshold
        assert self.type == "argmax"
        token = p.index(max(p))
        self.same = self.same + 1 if before and token == before.index(max(before)) else 1
        return self.same >= self.patience

    def output(self, latent: Tensor) -> Tensor:
        """Return what the coda reads: of act the mixture, the last one taking the rest."""
        if self.type != "act":
            return latent
        whole = [*self.mixed, (1 - self.total, latent)]
        return torch.stack([weight * s for weight, s in whole]).sum(0)


def entropy(p: Sequence[float]) -> float:
    return -sum(x * math.log(x) for x in p)


class Decoded:
    """One text, decoded by a looped model of attention blocks without step signal.

    Args:
        model: the model.
        ids: the text.
        depths: how often each token iterates, at most.
        look_up: see LookUp.
        rule: makes the rule of a token; None: none stops early.
        copies: a token that stopped goes on being shown, with its last latent state.
        prompt: so many tokens are read together; among themselves they look up every recurrence.

    Attributes:
        logits_TV: of each token.
        steps: how often each token has iterated.
    """

    def __init__(
        self,
        model: Backbone,
        ids: Sequence[int],
        depths: Sequence[int],
        look_up: LookUp = every,
        rule: Callable[[], Rule] = lambda: Rule("none"),
        copies: bool = False,
        prompt: int = 0,
    ) -> None:
        self.model, self.look_up, self.prompt = model, look_up, prompt
        # Keys and values of every block, token and recurrence.
        self.table: list[list[list[tuple[Tensor, Tensor]]]] = [
            [[] for _ in ids] for _ in model.blocks
        ]
        self.steps: list[int] = []
        rows = [self.token(t, ids[t], depths[t], rule(), copies) for t in range(len(ids))]
        self.logits_TV = torch.stack(rows)

    def token(self, t: int, token: int, depth: int, rule: Rule, copies: bool) -> Tensor:
        model, stack = self.model, self.model.stack
        e = model.embedding.weight[token] * model.config.embedding_scale
        for b in stack.prelude:
            e = self.block(b, e, t, 0)
        std = stack.config.initial_std
        latent = random_latent(torch.tensor([t]), None, len(e), std)[0].to(e.dtype)
        runs, made = True, 0
        for i in range(depth):
            new = stack.adapter.weight @ torch.cat([latent, e])
            for b in stack.core:
                new = self.block(b, new, t, i)
            if stack.update is not None:
                new = stack.update(new, latent)
            if runs:
                old, latent, made = latent, new, i + 1
                runs = rule.type == "none" or not rule.stops(old, new, partial(self.readout, t=t))
            if not (runs or copies):
                break
        self.steps.append(made)
        return self.readout(rule.output(latent), t, keep=True)

    def readout(self, latent: Tensor, t: int, keep: bool = False) -> Tensor:
        model = self.model
        x = model.norm(latent) if model.stack.config.norm_core_output else latent
        for b in model.stack.coda:
            x = self.block(b, x, t, 0)
            if not keep:
                self.table[b][t].pop()
        return model.head(model.norm(x), model.embedding.weight)

    def block(self, b: int, x: Tensor, t: int, i: int) -> Tensor:
        """Run a block on a token, keys and values of its own going to the table."""
        block = self.model.block(b)
        h, mixer, config = block.mixer_norm(x), block.mixer, block.mixer.config
        q_HK, k_HK, v_HK = (
            linear(h).view(config.num_heads, -1) for linear in (mixer.q, mixer.k, mixer.v)
        )
        q_HK, k_HK = turned(q_HK, t), turned(k_HK, t)
        self.table[b][t].append((k_HK, v_HK))
        seen = range(0 if config.window is None else max(t - config.window + 1, 0), t)
        pairs = [*(self.seen(b, p, t, i) for p in seen), (k_HK, v_HK)]
        k_SHK, v_SHK = (torch.stack(part) for part in zip(*pairs, strict=True))
        scores_SH = (k_SHK * q_HK).sum(-1) / q_HK.shape[-1] ** 0.5
        y_HK = (scores_SH.softmax(0)[..., None] * v_SHK).sum(0)
        x = block.mixer_residual(x, mixer.out_proj(y_HK.flatten()))
        return block.ffn_residual(x, block.ffn(block.ffn_norm(x)))

    def seen(self, b: int, p: int, t: int, i: int) -> tuple[Tensor, Tensor]:
        """Return the key and value of token p that token t sees in recurrence i."""
        entries = self.table[b][p]
        return entries[i if t < self.prompt else self.look_up(len(entries), i)]


def turned(x_HK: Tensor, position: int) -> Tensor:
    """Return heads after RoPE (base 10,000, halves paired), by complex numbers."""
    half = x_HK.shape[-1] // 2
    pairs = torch.complex(x_HK[:, :half], x_HK[:, half:])
    angle = position * 10_000.0 ** (-torch.arange(half, dtype=x_HK.dtype) / half)
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag], -1)
