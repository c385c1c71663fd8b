"""The mixer contract: what a token mixer offers to the backbone, and knows of it."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from megarec.models.context import Context
from megarec.models.init import Initializer
from megarec.models.state import State


class Mixer(nn.Module):
    """Mixes tokens over time. Written once; it knows nothing of ranks.

    Parameters in a submodule listed in `float32_modules` keep float32 in any precision; that
    submodule computes with them and returns activations.
    """

    float32_modules: tuple[str, ...] = ()

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, ctx: Context, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Mix a whole sequence.

        Args:
            x_BTD: (batch, time, d_model).
            ctx: document boundaries.
            state: of the tokens before; None at a start.

        Returns:
            y (batch, time, d_model) and the state after the last token.
        """

    @abstractmethod
    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix one token x (batch, d_model); returns y (batch, d_model) and the next state."""

    @abstractmethod
    def init_state(self, batch_size: int, device: torch.device) -> State:
        """Return the state before the first token: a flat dict of tensors, batch first."""

    def inherit(self, before: State, deeper: State, num_tokens: int) -> State:
        """Return the state of a recurrence of a looped stack that the last tokens did not reach.

        `before` is its state before them, `deeper` that of the deepest recurrence that they
        reached, after them. By default they are not seen there at all.
        """
        return before

    @abstractmethod
    def init_weights(self, init: Initializer) -> None:
        """Write the initial value of every parameter."""

    def constrain_(self) -> None:
        """Bring parameters back to where they must be; called after each optimizer step.

        They may be sharded: what is done must be elementwise.
        """

    def metrics(self) -> dict[str, float]:
        """Return numbers for the log, gathered since the last call; the largest counts."""
        return {}

    @abstractmethod
    def tp_plan(self) -> dict[str, str]:
        """Return {parameter glob: column | row | head | replicate} for tensor parallelism.

        A rank has whole heads: its part of the first dim of `column` and `head` parameters and of
        the last dim of `row` ones. The outputs of the parts add up to that of the whole.
        """

    @abstractmethod
    def hf_names(self) -> dict[str, str]:
        """Return {own parameter name: leaf name in the Hugging Face layout}.

        Parameters of one leaf name are one tensor there: they are joined along their first dim,
        in this order.
        """
