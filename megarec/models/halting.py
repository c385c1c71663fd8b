"""Halting rules of a looped stack: when a token stops iterating, and what it gives out then."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from megarec.config.base import NonNegativeFloat, PositiveInt
from megarec.config.stack import HaltConfig
from megarec.models.init import Initializer

Threshold = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Readout = Callable[[Tensor], Tensor]
"""What the model would predict if the iteration ended here: latent state -> logits (..., V)."""


class Halt(nn.Module):
    """A halting rule."""

    @abstractmethod
    def start(self) -> "Iteration":
        """Begin a run of the loop."""

    def init_weights(self, init: Initializer) -> None:
        """Write the initial value of every parameter."""


class Iteration:
    """One run of the loop: who still iterates, and what comes out. By default all do, to the end.

    Every dim of a latent state but the last is batch.

    Attributes:
        running: bool (...), whether a token iterates; None where all always do.
        num_steps: int64 (...), how often each token has iterated; None where all always do.
    """

    running: Tensor | None = None
    num_steps: Tensor | None = None

    def advance(self, old: Tensor, new: Tensor, readout: Readout) -> Tensor:
        """Take in one recurrence, old -> new; returns the latent state after it."""
        return new

    def output(self, latent: Tensor) -> Tensor:
        """Return what the coda reads, given the last latent state."""
        return latent

    def penalty(self) -> Tensor | None:
        """Return what is added to each token's loss in training, (...); None for nothing."""
        return None

    def exits(self) -> list[tuple[Tensor, Tensor]]:
        """Return latent states that the loss is made of, and the weight (...) of each.

        Empty: the output alone counts.
        """
        return []


class Stopping(Iteration):
    """One run in which tokens stop.

    A token that has stopped keeps its latent state: others go on seeing it.
    """

    def advance(self, old: Tensor, new: Tensor, readout: Readout) -> Tensor:
        """Take in one recurrence of those that run; see Stopping."""
        if self.running is None or self.num_steps is None:
            self.running = torch.ones(new.shape[:-1], dtype=torch.bool, device=new.device)
            self.num_steps = torch.zeros_like(self.running, dtype=torch.int64)
        new = torch.where(self.running[..., None], new, old)
        self.num_steps = self.num_steps + self.running
        self.running = self.running & ~self.stops(old, new, readout)
        return new

    @abstractmethod
    def stops(self, old: Tensor, new: Tensor, readout: Readout) -> Tensor:
        """Return, bool (...), whether a token stops after this recurrence."""


class Halting:
    """A rule that is chosen at run time, and a count of how often tokens iterate.

    With cache `full` a loop of `step` equals `forward` exactly under `latent`. Rules that read out
    predictions do so through the coda: where it mixes tokens, `forward` shows a token the others as
    they are by then, `step` shows them finished, and the two may stop at different recurrences.

    Args:
        config: the rule; None for the model's own, so that only the count is asked for.
    """

    def __init__(self, config: HaltConfig | None = None) -> None:
        if config is not None and config.learned:
            raise ValueError(f"halting: {config.type} is learned; the model's own config sets it")
        self.config = config
        self.num_tokens = 0
        self.num_steps = 0

    def count(self, num_steps: Tensor) -> None:
        """Add tokens by the number of times that each has iterated."""
        self.num_tokens += num_steps.numel()
        self.num_steps += int(num_steps.sum())

    @property
    def mean_steps(self) -> float:
        """The average number of recurrences a token."""
        return self.num_steps / self.num_tokens if self.num_tokens else math.nan


class LatentConfig(HaltConfig):
    """Stop once ||s' - s|| / ||s'|| < threshold (Huginn's latent-diff)."""

    type: Literal["latent"] = "latent"
    threshold: Threshold = 0.03

    def build(self, d_model: int) -> Halt:
        """Build the module."""
        return Observed(lambda: LatentDifference(self.threshold))


class EntropyConfig(HaltConfig):
    """Stop once the entropy of the prediction changes by less than threshold nats."""

    type: Literal["entropy"] = "entropy"
    threshold: Threshold = 1e-3

    def build(self, d_model: int) -> Halt:
        """Build the module."""
        return Observed(lambda: EntropyDifference(self.threshold))


class KLConfig(HaltConfig):
    """Stop once KL(prediction before || prediction) < threshold nats (arXiv 2502.05171, 6.1)."""

    type: Literal["kl"] = "kl"
    threshold: Threshold = 5e-4

    def build(self, d_model: int) -> Halt:
        """Build the module."""
        return Observed(lambda: Divergence(self.threshold))


class ArgmaxConfig(HaltConfig):
    """Stop once the most likely token has been the same for `patience` recurrences in a row."""

    type: Literal["argmax"] = "argmax"
    patience: PositiveInt = 5

    def build(self, d_model: int) -> Halt:
        """Build the module."""
        return Observed(lambda: ArgmaxStability(self.patience))


class Observed(Halt):
    """A rule without parameters."""

    def __init__(self, begin: Callable[[], Iteration]) -> None:
        super().__init__()
        self.begin = begin

    def start(self) -> Iteration:
        """Begin a run of the loop."""
        return self.begin()


class LatentDifference(Stopping):
    """See LatentConfig."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def stops(self, old: Tensor, new: Tensor, readout: Readout) -> Tensor:
        """Compare the latent states; see Stopping."""
        old, new = _wide(old), _wide(new)
        return (new - old).norm(dim=-1) < self.threshold * new.norm(dim=-1)


class EntropyDifference(Stopping):
    """See EntropyConfig."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.before: Tensor | None = None

    def stops(self, old: Tensor, new: Tensor, readout: Readout) -> Tensor:
        """Compare the entropies; nothing stops at the first look. See Stopping."""
        log_p = readout(new).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        before, self.before = self.before, entropy
        if before is None:
            return torch.zeros_like(entropy, dtype=torch.bool)
        return (entropy - before).abs() < self.threshold


class Divergence(Stopping):
    """See KLConfig."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.before: Tensor | None = None

    def stops(self, old: Tensor, new: Tensor, readout: Readout) -> Tensor:
        """Compare the predictions, the one before the first being uniform; see Stopping."""
        log_p = readout(new).log_softmax(-1)
        before = torch.full_like(log_p, -math.log(log_p.shape[-1]))
        before, self.before = self.before if self.before is not None else before, log_p
        kl = F.kl_div(log_p, before, reduction="none", log_target=True).sum(-1)
        # Never below 0 but by rounding: a threshold of 0 stops nothing.
        return kl.clamp(min=0) < self.threshold


class ArgmaxStability(Stopping):
    """See ArgmaxConfig."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.before: Tensor | None = None
        self.same: Tensor | None = None

    def stops(self, old: Tensor, new: Tensor, readout: Readout) -> Tensor:
        """Count how long the most likely token has stayed; see Stopping."""
        token = readout(new).argmax(-1)
        if self.before is None or self.same is None:
            self.same = torch.ones_like(token)
        else:
            self.same = torch.where(token == self.before, self.same + 1, 1)
        self.before = token
        return self.same >= self.patience


class ACTConfig(HaltConfig):
    """Adaptive computation time (arXiv 1603.08983; in depth: Universal Transformer, 1807.03819).

    A token halts with probability p_t = sigmoid(w s_t + b) at each recurrence, and stops where the
    sum exceeds 1 - `eps`, or at the last. What comes out is sum_t p_t s_t, the remainder R at the
    last t = N making the weights sum to 1. Training adds `ponder_weight` * (N + R) to each token's
    loss, N being a constant. `bias` is the initial b.
    """

    type: Literal["act"] = "act"
    learned: ClassVar[bool] = True
    eps: Annotated[float, Field(gt=0, lt=1)] = 0.01
    ponder_weight: NonNegativeFloat = 0.001
    bias: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    def build(self, d_model: int) -> Halt:
        """Build the module."""
        return ACT(self, d_model)


class Unit(Halt):
    """A halting rule with a linear unit w s + b, computed in float32 at least."""

    def __init__(self, d_model: int, bias: float) -> None:
        super().__init__()
        self.initial_bias = bias
        self.unit = nn.Linear(d_model, 1)

    def probability(self, latent: Tensor) -> Tensor:
        """Return sigmoid(w s + b), (...)."""
        raw = _wide(F.linear(latent, self.unit.weight))[..., 0]
        return torch.sigmoid(raw + _wide(self.unit.bias))

    def init_weights(self, init: Initializer) -> None:
        """Draw w with std; see Halt."""
        init.normal(self.unit.weight, init.std)
        init.constant(self.unit.bias, self.initial_bias)


class ACT(Unit):
    """See ACTConfig."""

    def __init__(self, config: ACTConfig, d_model: int) -> None:
        super().__init__(d_model, config.bias)
        self.config = config

    def start(self) -> Iteration:
        """Begin a run of the loop."""
        return Pondering(self)


class Pondering(Stopping):
    """One run of the loop under ACT."""

    def __init__(self, act: ACT) -> None:
        self.act = act
        self.total: Tensor | None = None  # sum of the weights so far, (...)
        self.last: Tensor | None = None  # weight of the last recurrence, (...)
        self.mixed: Tensor | None = None  # sum of weighted latent states, (..., d_model)

    def stops(self, old: Tensor, new: Tensor, readout: Readout) -> Tensor:
        """Add p_t s_t, or where the sum is reached the rest; see Stopping."""
        assert self.running is not None
        p = self.act.probability(new)
        if self.total is None or self.mixed is None or self.last is None:
            self.total, self.last = torch.zeros_like(p), torch.zeros_like(p)
            self.mixed = torch.zeros_like(new, dtype=p.dtype)
        stop = self.running & (self.total + p > 1 - self.act.config.eps)
        weight = torch.where(stop, 1 - self.total, p) * self.running
        self.last = torch.where(self.running, weight, self.last)
        self.total = self.total + weight
        self.mixed = self.mixed + weight[..., None] * new
        return stop

    def output(self, latent: Tensor) -> Tensor:
        """Return the mixture; those that never stopped give the rest to the last. See Stopping."""
        assert self.mixed is not None and self.total is not None
        return (self.mixed + (1 - self.total)[..., None] * latent).to(latent.dtype)

    def penalty(self) -> Tensor:
        """Return the ponder cost; see Stopping."""
        assert self.num_steps is not None and self.last is not None and self.total is not None
        remainder = self.last + (1 - self.total)
        return self.act.config.ponder_weight * (self.num_steps + remainder)


class ExitGateConfig(HaltConfig):
    """A distribution over exits, learned with the model (Ouro/LoopLM, arXiv 2510.25741, stage 1).

    lambda_t = sigmoid(w s_t + b), p_t = lambda_t prod_(j<t) (1 - lambda_j), the last recurrence
    taking the rest. A token's loss is sum_t p_t CE_t - `entropy_weight` * H(p): every recurrence is
    read out. Outside of training a token stops once sum_(j<=t) p_j > `threshold`; at 1 none does.
    """

    type: Literal["exit_gate"] = "exit_gate"
    learned: ClassVar[bool] = True
    threshold: Annotated[float, Field(ge=0, le=1)] = 1.0
    entropy_weight: NonNegativeFloat = 0.1

    def build(self, d_model: int) -> Halt:
        """Build the module."""
        return ExitGate(self, d_model)


class ExitGate(Unit):
    """See ExitGateConfig."""

    def __init__(self, config: ExitGateConfig, d_model: int) -> None:
        super().__init__(d_model, 0.0)
        self.config = config

    def start(self) -> Iteration:
        """Begin a run of the loop."""
        return Exits(self)


class Exits(Stopping):
    """One run of the loop with an exit gate."""

    def __init__(self, gate: ExitGate) -> None:
        self.gate = gate
        self.rest: Tensor | None = None  # prod of (1 - lambda) so far, (...)
        self.weighted: list[tuple[Tensor, Tensor]] = []

    def stops(self, old: Tensor, new: Tensor, readout: Readout) -> Tensor:
        """Split lambda_t of what is left off; see Stopping."""
        gate = self.gate.probability(new)
        rest = torch.ones_like(gate) if self.rest is None else self.rest
        self.rest = rest * (1 - gate)
        if self.gate.training:
            self.weighted.append((new, rest * gate))
            return torch.zeros_like(gate, dtype=torch.bool)
        return 1 - self.rest > self.gate.config.threshold

    def exits(self) -> list[tuple[Tensor, Tensor]]:
        """Return every latent state with its probability, in training; see Stopping."""
        if not self.weighted or self.rest is None:
            return []
        latent, weight = self.weighted[-1]
        return [*self.weighted[:-1], (latent, weight + self.rest)]

    def penalty(self) -> Tensor | None:
        """Return -entropy_weight * H(p); see Stopping."""
        weights = [weight for _, weight in self.exits()]
        if not weights:
            return None
        p = torch.stack(weights)
        # A shut gate makes p exactly 0, where p log p has no slope.
        entropy = -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(0)
        return -self.gate.config.entropy_weight * entropy


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
