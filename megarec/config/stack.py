"""The stack section: how the blocks are arranged, each once or some of them in a loop."""

import importlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import SerializeAsAny, model_validator

from megarec.config.activations import Numbers
from megarec.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Registered, StrictModel
from megarec.config.depth import DepthConfig

if TYPE_CHECKING:
    from megarec.models.halting import Halt
    from megarec.models.update import Update

POSITION_BYTES = 8


class StackConfig(Registered):
    """How the blocks are arranged. What it counts is beside the blocks themselves."""

    kind: ClassVar[str] = "stack"

    def problems(self, num_layers: int) -> list[str]:
        """Say what does not fit this number of blocks, one line each; empty when all is well."""
        return []

    @property
    def core_blocks(self) -> range:
        """The indices of the blocks that a forward pass runs again and again."""
        return range(0)

    def times_run(self, num_layers: int, num_recurrences: float | None = None) -> list[float]:
        """Return how often a forward pass runs each block, by default as often as in decoding."""
        return [1.0] * num_layers

    def times_trained(self, num_layers: int, num_recurrences: float | None = None) -> list[float]:
        """Return how many of those runs a training step differentiates, on average."""
        return self.times_run(num_layers, num_recurrences)

    def training_recurrences(self) -> float | None:
        """Return the mean number of recurrences in training; None where nothing is looped."""
        return None

    def num_params(self, d_model: int) -> int:
        """Return the number of parameters beside the blocks."""
        return 0

    def flops_per_token(self, d_model: int, num_recurrences: float | None = None) -> float:
        """Return the FLOPs of the forward pass beside the blocks, per token."""
        return 0.0

    def activations(self, d_model: int) -> Numbers:
        """Return what a recurrence keeps for the backward pass beside its blocks, a token."""
        return Numbers()

    def states_kept(self, num_layers: int) -> list[int]:
        """Return of how many runs of each block the decoding state is kept."""
        return [1] * num_layers

    def state_bytes(self) -> int:
        """Return the bytes of one sequence's decoding state beside the blocks'."""
        return 0


class SequentialConfig(StackConfig):
    """Each block once, in order."""

    type: Literal["sequential"] = "sequential"


class UpdateConfig(Registered):
    """How a core's output F and the latent state s before it make the next one.

    Every rule in ``megarec/models/update.py`` registers itself.
    """

    kind: ClassVar[str] = "update rule"

    @classmethod
    def discover(cls) -> None:
        """Import the rules that ship with megarec."""
        importlib.import_module("megarec.models.update")

    def num_params(self, d_model: int) -> int:
        """Return the number of parameters."""
        return 0

    def flops_per_token(self, d_model: int) -> float:
        """Return the FLOPs of one update, per token (matmuls)."""
        return 0.0

    def activations(self, d_model: int) -> Numbers:
        """Return what an update keeps for the backward pass, a token."""
        return Numbers()

    @abstractmethod
    def build(self, d_model: int) -> "Update":
        """Build the module."""


class HaltConfig(Registered):
    """When a token stops iterating.

    Every rule in ``megarec/models/halting.py`` registers itself. A `learned` one has parameters,
    and a say in training; the others are read off the latent state, and may be chosen at run time.
    """

    kind: ClassVar[str] = "halting rule"
    learned: ClassVar[bool] = False

    @classmethod
    def discover(cls) -> None:
        """Import the rules that ship with megarec."""
        importlib.import_module("megarec.models.halting")

    def num_params(self, d_model: int) -> int:
        """Return the number of parameters: of a learned rule, a linear map to one number."""
        return d_model + 1 if self.learned else 0

    def flops_per_token(self, d_model: int) -> float:
        """Return the FLOPs of one look at the latent state, per token (matmuls)."""
        return 2.0 * d_model if self.learned else 0.0

    @abstractmethod
    def build(self, d_model: int) -> "Halt":
        """Build the module."""


class CacheConfig(StrictModel):
    """What decoding keeps of the recurrences of a token; its memory is that of so many states.

    `full`: every one, so that decoding is the training forward exactly; all tokens iterate equally
    often. `latest`: every one, too, but tokens may stop at different depths: deeper recurrences of
    later tokens find the deepest keys of a token that stopped (recurrent mixers do not see it
    there). `modulo`: recurrence i in slot i mod `slots`, the latest one counts: constant memory
    however often a token iterates, and depths may differ (Huginn, arXiv 2502.05171, section 6.2).
    """

    type: Literal["full", "latest", "modulo"] = "full"
    slots: PositiveInt | None = None

    @model_validator(mode="after")
    def _slots(self) -> "CacheConfig":
        if (self.type == "modulo") != (self.slots is not None):
            raise ValueError("slots: modulo needs a number, full and latest take none")
        return self

    def num_slots(self, num_recurrences: int) -> int:
        """Return the number of states kept for so many recurrences."""
        return num_recurrences if self.slots is None else min(self.slots, num_recurrences)


class LoopedConfig(StackConfig):
    """A recurrent-depth stack: prelude -> r times (inject, core, update) -> coda.

    `prelude`, `core` and `coda` say how many blocks of the pattern belong to each part, in this
    order. With e the prelude's output and s_0 the `initial_state`,

        u_i = inject(s_i, e) + signal(i);  s_(i+1) = update(core(u_i), s_i);  out = coda(s_r)

    `inject`: `concat` is a learned A [s; e] without bias, `add` is s + e, `none` is s.
    `step_signal`: `learned` adds a vector of the recurrence, the last of `num_step_embeddings` for
    all later ones; `sinusoid` adds sinusoids of the token's position and of the recurrence
    (Universal Transformer, arXiv 1807.03819). `initial_state`: `random` draws a normal, cut at 3
    standard deviations, from (seed, step, sample, position); `zero`; `embedding` is e.
    `norm_core_output` puts s_r through the model's last norm before the coda (Huginn's, with the
    same weights as before the head).

    `num_recurrences` is r outside of training, unless given at run time. In training `depth` draws
    it (default: the same r), and of the r recurrences the last `backprop` are differentiated
    (default: all).
    """

    type: Literal["looped"] = "looped"
    prelude: NonNegativeInt = 0
    core: NonNegativeInt
    coda: NonNegativeInt = 0
    inject: Literal["concat", "add", "none"] = "concat"
    step_signal: Literal["learned", "sinusoid"] | None = None
    num_step_embeddings: PositiveInt | None = None
    update: SerializeAsAny[UpdateConfig] | None = None
    initial_state: Literal["random", "zero", "embedding"] = "random"
    initial_std: PositiveFloat = (2 / 5) ** 0.5
    norm_core_output: bool = False
    num_recurrences: PositiveInt
    depth: SerializeAsAny[DepthConfig] | None = None
    backprop: PositiveInt | None = None
    halt: SerializeAsAny[HaltConfig] | None = None
    cache: CacheConfig = CacheConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "LoopedConfig":
        problems = []
        if self.core == 0:
            problems.append("core=0: nothing would be looped; give the core at least one block")
        if (self.step_signal == "learned") != (self.num_step_embeddings is not None):
            problems.append("num_step_embeddings: the number of vectors of step_signal=learned")
        if self.halt is not None and self.halt.learned and self.backprop is not None:
            problems.append(
                f"backprop={self.backprop}: halt={self.halt.type} learns from every recurrence; "
                "leave backprop out"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def problems(self, num_layers: int) -> list[str]:
        """The parts must add up to the blocks."""
        total = self.prelude + self.core + self.coda
        if total == num_layers:
            return []
        return [
            f"prelude={self.prelude} + core={self.core} + coda={self.coda} = {total}; expected "
            f"num_layers={num_layers}"
        ]

    @property
    def core_blocks(self) -> range:
        """Those after the prelude."""
        return range(self.prelude, self.prelude + self.core)

    def times_run(self, num_layers: int, num_recurrences: float | None = None) -> list[float]:
        """The core's blocks run once a recurrence."""
        r = self.num_recurrences if num_recurrences is None else num_recurrences
        return [1.0] * self.prelude + [float(r)] * self.core + [1.0] * self.coda

    def times_trained(self, num_layers: int, num_recurrences: float | None = None) -> list[float]:
        """Of the core's, the last `backprop`."""
        r = self.num_recurrences if num_recurrences is None else num_recurrences
        return self.times_run(num_layers, min(r, self.backprop or r))

    def training_recurrences(self) -> float:
        """The distribution's mean."""
        return float(self.num_recurrences) if self.depth is None else self.depth.mean_recurrences()

    def num_params(self, d_model: int) -> int:
        """Count the adapter, the vectors of recurrences, the update and the halting rule."""
        adapter = 2 * d_model * d_model if self.inject == "concat" else 0
        signal = (self.num_step_embeddings or 0) * d_model
        parts = [part for part in (self.update, self.halt) if part is not None]
        return adapter + signal + sum(part.num_params(d_model) for part in parts)

    def flops_per_token(self, d_model: int, num_recurrences: float | None = None) -> float:
        """Count matmuls; what the adapter makes of e is computed once."""
        r = self.num_recurrences if num_recurrences is None else num_recurrences
        adapter = 2.0 * d_model * d_model * (r + 1) if self.inject == "concat" else 0.0
        parts = [part for part in (self.update, self.halt) if part is not None]
        return adapter + r * sum(part.flops_per_token(d_model) for part in parts)

    def activations(self, d_model: int) -> Numbers:
        """Count what adapter and update read; what a halting rule keeps is not counted."""
        adapter = Numbers(narrow=d_model if self.inject == "concat" else 0)
        return adapter if self.update is None else adapter + self.update.activations(d_model)

    def states_kept(self, num_layers: int) -> list[int]:
        """As many of the core's as the cache has slots."""
        slots = self.cache.num_slots(self.num_recurrences)
        return [1] * self.prelude + [slots] * self.core + [1] * self.coda

    def state_bytes(self) -> int:
        """The next token's position in its document (int64)."""
        return POSITION_BYTES


def repeated(values: Sequence[float], times: Sequence[float]) -> float:
    """Return the sum of values, each so many times."""
    return sum(value * count for value, count in zip(values, times, strict=True))
