"""Loss, perplexity and bits per byte on held-out tokens."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megarec.data.loader import EvalLoader
from megarec.models.backbone import Backbone
from megarec.models.context import Context


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
) -> dict[str, LossResult]:
    """Evaluate each source of the loader, each window from a fresh state.

    Args:
        model: evaluated in eval mode (no z-loss); its mode is restored.
        loader: gives every rank the same number of batches.
        device: of the model.
        sum_over_ranks: adds numbers over the ranks that share the loader.
        num_recurrences: of a looped stack; None as its config says.

    Returns:
        source name -> result. A source without tokens has loss nan.
    """
    was_training = model.training
    model.eval()
    names = [source.name for source in loader.sources]
    loss_sums = dict.fromkeys(names, 0.0)
    num_tokens = dict.fromkeys(names, 0)
    for name, batch in loader:
        loss, _ = model(
            batch.input_ids.to(device),
            batch.labels.to(device),
            ctx=Context.from_doc_ids(batch.doc_ids).to(device),
            num_recurrences=num_recurrences,
        )
        loss_sums[name] += loss.item()
        num_tokens[name] += batch.num_tokens
    model.train(was_training)
    totals = sum_over_ranks([*loss_sums.values(), *num_tokens.values()])
    results = {}
    for i, source in enumerate(loader.sources):
        total, count = totals[i], totals[len(names) + i]
        loss_mean = total / count if count else math.nan
        results[source.name] = LossResult(loss_mean, int(count), source.bytes_per_token)
    return results
