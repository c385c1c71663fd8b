"""Stacks: how the blocks are arranged. Blocks come as functions, so that a stack knows no modes."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megarec.models.context import Context
from megarec.models.init import Initializer
from megarec.models.state import State, prefixed, sub_state

Run = Callable[[int, Tensor, State | None], tuple[Tensor, State]]
"""(index of a block, x, its state) -> (x, state): on whole sequences, or on one token."""

Inherit = Callable[[int, State | None, State, int], State]
"""(index of a block, its state before, that of a deeper recurrence, number of tokens) -> its state
where the tokens did not come; see Mixer.inherit. None stands for the state at a start."""


@dataclass(frozen=True)
class Passed:
    """What comes out of a stack.

    Attributes:
        x: what the last norm reads, (B, T, d_model) or (B, d_model).
        state: after the last token; empty unless it was asked for.
        exits: pairs (x, weight (B, T)) that the loss is the weighted sum of, in place of x alone.
        penalty: added to the loss of each token in training, (B, T).
    """

    x: Tensor
    state: State = field(default_factory=dict)
    exits: Sequence[tuple[Tensor, Tensor]] = ()
    penalty: Tensor | None = None


@dataclass(frozen=True)
class Surroundings:
    """What a stack may use of the model around it.

    Attributes:
        run: runs a block.
        inherit: makes the state of a block that tokens did not reach.
        norm: the model's last norm.
        readout: x (..., d_model) -> logits (..., V).
    """

    run: Run
    inherit: Inherit
    norm: Callable[[Tensor], Tensor]
    readout: Callable[[Tensor], Tensor]


class Stack(nn.Module):
    """Runs blocks in some order; it holds no blocks, only what there is beside them."""

    recompute = False
    """Free the activations of each recurrence in the forward pass, and compute them again."""

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        ctx: Context,
        around: Surroundings,
        state: State | None,
        keep_state: bool,
        layers: range | None = None,
    ) -> Passed:
        """Run all blocks on embeddings (B, T, d_model), or (B, d_model) of one token.

        Args:
            x: the embeddings.
            ctx: see Context.
            around: the model.
            state: of the tokens before.
            keep_state: return the state after the last token.
            layers: run these only, in a pipeline: x is then what comes out of those before. A
                looped core is run as a whole.
        """

    def init_state(
        self,
        blocks: dict[int, State],
        batch_size: int,
        device: torch.device,
        num_recurrences: int | None,
    ) -> State:
        """Return the state before the first token, made of that of each block, by index."""
        state: State = {}
        for i, block_state in blocks.items():
            state |= prefixed(block_state, f"blocks.{i}.")
        return state

    def init_weights(self, init: Initializer) -> None:
        """Write the initial value of every parameter."""

    def metrics(self) -> dict[str, float]:
        """Return numbers for the log, gathered since the last call."""
        return {}


class Sequential(Stack):
    """Each block once, in order."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.num_layers = num_layers

    def forward(
        self,
        x: Tensor,
        ctx: Context,
        around: Surroundings,
        state: State | None,
        keep_state: bool,
        layers: range | None = None,
    ) -> Passed:
        """Run the blocks; see Stack."""
        layers = range(self.num_layers) if layers is None else layers
        return Passed(*run_once(layers, x, around.run, state, keep_state))


def run_once(
    indices: Sequence[int], x: Tensor, run: Run, state: State | None, keep_state: bool
) -> tuple[Tensor, State]:
    """Run blocks one after the other; returns x and their states, under `blocks.{i}.`."""
    after: State = {}
    for i in indices:
        prefix = f"blocks.{i}."
        x, block_state = run(i, x, sub_state(state, prefix))
        if keep_state:
            after |= prefixed(block_state, prefix)
    return x, after
