"""The backbone: embedding, a stack of blocks, final norm, head."""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from megarec.config.model import ModelConfig
from megarec.models.block import Block
from megarec.models.context import Context
from megarec.models.head import IGNORE_INDEX, Criterion, Head
from megarec.models.init import Assign, Initializer, assign_whole
from megarec.models.norm import RMSNorm
from megarec.models.state import State, prefixed, sub_state


class Backbone(nn.Module):
    """A causal language model over any pattern of blocks.

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
        self.norm = RMSNorm(config.d_model, config.norm.eps)
        self.head = Head(config.head, config.vocab_size, config.d_model)

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
    ) -> Any:
        """Run the model on whole sequences.

        Args:
            input_ids: int64 (B, T).
            labels: int64 (B, T), the token to predict at each position (already shifted), -100
                for none.
            ctx: document boundaries; without it each row is one document.
            state: carried state of the tokens before (see `init_state`).
            return_state: append the state after the last token to the result.
            criterion: computes the loss in place of the cross-entropy; see Head.

        Returns:
            logits (B, T, V), float32 at least; with labels, the pair (loss_sum, num_tokens): the
            sum of the tokens' losses in nats, and their number, both scalars.
        """
        x_BTD, state = self.features(input_ids, ctx, state)
        outcome = self.head(x_BTD, self.embedding.weight, labels, criterion)
        results = [outcome]
        if labels is not None:
            results.append((labels != IGNORE_INDEX).sum())
        if return_state:
            results.append(state)
        return results[0] if len(results) == 1 else tuple(results)

    def features(
        self, input_ids: Tensor, ctx: Context | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Return what the head reads, (B, T, D), and the state after the last token."""
        ctx = ctx or Context()
        x_BTD = self._embed(input_ids)
        after: State = {}
        for name, block in self.layers():
            prefix = f"blocks.{name}."
            try:
                x_BTD, block_state = block(x_BTD, ctx, sub_state(state, prefix))
            except ArithmeticError as error:
                raise type(error)(f"layer {name}: {error}") from error
            after |= prefixed(block_state, prefix)
        return self.norm(x_BTD), after

    def step(self, input_ids_B: Tensor, state: State) -> tuple[Tensor, State]:
        """Decode one token: ids int64 (B,) and the state -> logits (B, V) and the next state."""
        x_BD = self._embed(input_ids_B)
        after: State = {}
        for name, block in self.layers():
            prefix = f"blocks.{name}."
            x_BD, block_state = block.step(x_BD, sub_state(state, prefix) or {})
            after |= prefixed(block_state, prefix)
        return self.head(self.norm(x_BD), self.embedding.weight), after

    def _embed(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        scale = self.config.embedding_scale
        return x if scale == 1 else x * scale

    def init_state(self, batch_size: int) -> State:
        """Return the state before the first token."""
        device = self.embedding.weight.device
        state: State = {}
        for name, block in self.layers():
            state |= prefixed(block.init_state(batch_size, device), f"blocks.{name}.")
        return state

    def constrain_(self) -> None:
        """Bring parameters back to where they must be; called after each optimizer step."""
        for _, block in self.layers():
            if block.mixer is not None:
                block.mixer.constrain_()

    def metrics(self) -> dict[str, float]:
        """Return what the mixers log since the last call, the largest of the layers."""
        largest: dict[str, float] = {}
        for _, block in self.layers():
            for name, value in ({} if block.mixer is None else block.mixer.metrics()).items():
                largest[name] = max(value, largest.get(name, value))
        return largest

    @torch.no_grad()
    def init_weights(self, seed: int, assign: Assign = assign_whole) -> None:
        """Initialise every parameter; `assign` places a whole tensor into a (sharded) parameter."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.named_parameters()}
        init = Initializer(self.config, names, seed, assign)
        init.normal(self.embedding.weight, init.std)
        for _, block in self.layers():
            block.init_weights(init)
        self.norm.init_weights(init)
        self.head.init_weights(init)


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
