"""What a mixer must know about a batch beside its activations."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megarec.models.halting import Halting


@dataclass(frozen=True)
class Draw:
    """What the random numbers of a micro-batch hang on, and nothing else.

    Attributes:
        seed: of the run.
        step: of the optimizer, 0 for the first.
        micro_batch: 0 for the first of the run; the same number on all ranks.
        samples: the number of each row in the stream of samples, int64 (B,).
    """

    seed: int
    step: int
    micro_batch: int
    samples: Tensor


@dataclass(frozen=True)
class Context:
    """Document boundaries of a batch of rows, and how a looped stack is to run.

    Attributes:
        resets: bool (B, T), True where a document starts, i.e. where nothing before may be seen;
            None where each row is one document (or goes on from a carried state).
        exact: the resets must be exact even in a model that was trained with soft ones: they
            fence off padding, not another document.
        draw: set in training, where depth and latent states are random.
        num_recurrences: how often to iterate; None as the config says.
        latent: initial latent states (B, T, D), or (B, D) of one token; None as the config says.
        halting: a rule for when to stop iterating; None for the model's own, if any.
        here: which positions a looped stack iterates on, where ranks divide the tokens between
            mixers; None: all. All else is of the whole rows.
    """

    resets: Tensor | None = None
    exact: bool = False
    draw: Draw | None = None
    num_recurrences: int | None = None
    latent: Tensor | None = None
    halting: "Halting | None" = None
    here: slice | None = None

    @classmethod
    def from_doc_ids(cls, doc_ids: Tensor) -> "Context":
        """Derive resets from doc_ids, an integer CPU tensor (B, T), non-decreasing along T."""
        resets = torch.ones_like(doc_ids, dtype=torch.bool)
        resets[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
        # Rows of one document need no resets: each starts from a fresh state anyway.
        return cls(resets if resets[:, 1:].any() else None)

    def narrow(self, piece: slice) -> "Context":
        """Return the context of some positions of the rows."""
        resets, latent = self.resets, self.latent
        return replace(
            self,
            resets=None if resets is None else resets[:, piece],
            latent=None if latent is None else latent[:, piece],
        )

    def to(self, device: torch.device) -> "Context":
        """Return the context with its document boundaries on a device."""
        return self if self.resets is None else replace(self, resets=self.resets.to(device))

    @classmethod
    def left_padded(cls, lengths: Tensor, num_positions: int) -> "Context":
        """Fence off left padding: row b holds its lengths[b] tokens at the end of T positions."""
        position_T = torch.arange(num_positions, device=lengths.device)
        return cls(position_T == (num_positions - lengths)[:, None], exact=True)


def positions(num_tokens: int, resets_BT: Tensor | None, first_B: Tensor) -> Tensor:
    """Return each token's position in its document, int64 (B, T).

    Args:
        num_tokens: T.
        resets_BT: where documents start; None if nowhere.
        first_B: position of the first token, unless it starts a document.
    """
    index_T = torch.arange(num_tokens, device=first_B.device)
    if resets_BT is None:
        return first_B[:, None] + index_T
    start_BT = torch.where(resets_BT, index_T, -first_B[:, None]).cummax(1).values
    return index_T - start_BT
