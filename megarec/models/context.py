"""What a mixer must know about a batch beside its activations."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """Document boundaries of a batch of rows.

    Attributes:
        resets: bool (B, T), True where a document starts, i.e. where nothing before may be seen;
            None where each row is one document (or goes on from a carried state).
        exact: the resets must be exact even in a model that was trained with soft ones: they
            fence off padding, not another document.
    """

    resets: Tensor | None = None
    exact: bool = False

    @classmethod
    def from_doc_ids(cls, doc_ids: Tensor) -> "Context":
        """Derive resets from doc_ids, an integer CPU tensor (B, T), non-decreasing along T."""
        resets = torch.ones_like(doc_ids, dtype=torch.bool)
        resets[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
        # Rows of one document need no resets: each starts from a fresh state anyway.
        return cls(resets if resets[:, 1:].any() else None)

    def narrow(self, piece: slice) -> "Context":
        """Return the context of some positions of the rows."""
        return self if self.resets is None else replace(self, resets=self.resets[:, piece])

    def to(self, device: torch.device) -> "Context":
        """Return the context with its tensors on a device."""
        return self if self.resets is None else replace(self, resets=self.resets.to(device))

    @classmethod
    def left_padded(cls, lengths: Tensor, num_positions: int) -> "Context":
        """Fence off left padding: row b holds its lengths[b] tokens at the end of T positions."""
        position_T = torch.arange(num_positions, device=lengths.device)
        return cls(position_T == (num_positions - lengths)[:, None], exact=True)
