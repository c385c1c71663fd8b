"""The language-model head: projection to the vocabulary, soft cap, and the loss."""

from collections.abc import Callable
from typing import cast

import torch
from megarec_kernels.linear_cross_entropy import VocabularyPart, linear_cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F

from megarec.config.model import HeadConfig
from megarec.models.init import Initializer

IGNORE_INDEX = -100

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, T, D), weight (V, D), labels (B, T)) -> the summed loss, a scalar. What comes from the
head is ready for logits = x W^T: the logit scale is in x, the soft cap is the criterion's."""


class Head(nn.Module):
    """logits = c * tanh(s x W^T / c), in float32 at least; the loss never holds all of them.

    With tied embeddings the head has no weight of its own and is given the embedding's.
    `vocabulary` says which part of the vocabulary is here, where ranks divide it.
    """

    def __init__(self, config: HeadConfig, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary: VocabularyPart | None = None
        self.weight = (
            None if config.tie_embeddings else nn.Parameter(torch.empty(vocab_size, d_model))
        )

    def forward(
        self,
        x: Tensor,
        tied: Tensor | None,
        labels: Tensor | None = None,
        criterion: Criterion | None = None,
        token_weights: Tensor | None = None,
    ) -> Tensor:
        """Return logits, or the summed loss.

        Args:
            x: (..., d_model).
            tied: the embedding's weight (vocab, d_model), where the config ties them.
            labels: (...) int64, -100 where there is nothing to predict.
            criterion: computes the loss, by default `cross_entropy`.
            token_weights: (...), multiply the tokens' cross-entropies; they may have a gradient.

        Returns:
            logits (..., vocab); with labels, a scalar: the sum of cross-entropies in nats, in
            training mode plus z_loss * logsumexp^2.
        """
        weight = cast(Tensor, tied if self.weight is None else self.weight)
        if self.config.logit_scale != 1:
            x = x * self.config.logit_scale
        if labels is not None:
            if criterion is not None:
                return criterion(x, weight, labels)
            return self.cross_entropy(x, weight, labels, token_weights)
        logits = F.linear(x, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cap = self.config.soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def cross_entropy(
        self, x: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor | None = None
    ) -> Tensor:
        """Return the (weighted) sum of cross-entropies and z-losses; the ordinary Criterion."""
        return linear_cross_entropy(
            x,
            weight,
            labels,
            token_weights=token_weights,
            soft_cap=self.config.soft_cap,
            z_loss=self.config.z_loss if self.training else 0.0,
            ignore_index=IGNORE_INDEX,
            chunk_size=self.config.chunk_size,
            vocabulary=self.vocabulary,
        )

    def init_weights(self, init: Initializer) -> None:
        """Draw the weight with std."""
        if self.weight is not None:
            init.normal(self.weight, init.std)
