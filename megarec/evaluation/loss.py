"""Loss, perplexity and bits per byte on held-out tokens."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megarec.data.loader import EvalLoader
from megarec.models.backbone import Backbone
from megarec.models.context import Context
from megarec.parallel.mesh import ALONE, Place

LossSum = Callable[[Tensor, Tensor, Context], Tensor]
"""(input_ids, labels, context) -> the summed loss of the rows, a scalar."""


@dataclass(frozen=True)
class LossResult:
    """Mean loss in nats a token, and the number of tokens and (raw text) bytes a token."""

    loss: float
    num_tokens: int
    bytes_per_token: float | None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Loss in bits over the bytes of the tokens; comparable between tokenizers."""
        return self.bytes_per_token and self.loss / math.log(2) / self.bytes_per_token


@torch.no_grad()
def evaluate_loss(
    model: Backbone,
    loader: EvalLoader,
    device: torch.device,
    sum_over_ranks: Callable[[Sequence[float]], list[float]] = list,
    num_recurrences: int | None = None,
    loss_sum: LossSum | None = None,
    place: Place = ALONE,
) -> dict[str, LossResult]:
    """Evaluate each source of the loader, each window from a fresh state.

    Args:
        model: evaluated in eval mode (no z-loss); its mode is restored.
        loader: gives every rank the same number of batches.
        device: of the model.
        sum_over_ranks: adds numbers over the ranks that share the loader.
        num_recurrences: of a looped stack; None as its config says.
        loss_sum: computes the loss of a batch, in place of the model as a whole.
        place: where this rank stands among those that take part.

    Returns:
        source name -> result. A source without tokens has loss nan.
    """
    if loss_sum is None:

        def loss_sum(input_ids: Tensor, labels: Tensor, ctx: Context) -> Tensor:
            loss: Tensor = model(input_ids, labels, ctx=ctx)[0]
            return loss

    was_training = model.training
    model.eval()
    names = [source.name for source in loader.sources]
    loss_sums = dict.fromkeys(names, 0.0)
    num_tokens = dict.fromkeys(names, 0)
    for name, batch in loader:
        ctx = Context.from_doc_ids(batch.doc_ids).to(device)
        ctx = replace(ctx, num_recurrences=num_recurrences)
        loss = loss_sum(batch.input_ids.to(device), batch.labels.to(device), ctx)
        loss_sums[name] += loss.item() if place.counts_loss else 0.0
        num_tokens[name] += batch.num_tokens if place.counts_data else 0
    model.train(was_training)
    totals = sum_over_ranks([*loss_sums.values(), *num_tokens.values()])
    results = {}
    for i, source in enumerate(loader.sources):
        total, count = totals[i], totals[len(names) + i]
        loss_mean = total / count if count else math.nan
        results[source.name] = LossResult(loss_mean, int(count), source.bytes_per_token)
    return results
