"""Which keys a query may see, as the documents that queries and keys belong to."""

import torch
from torch import Tensor
from torch.nn import functional as F

NEVER = -1
"""The document of a cached key that does not count."""


def find_documents(
    resets_BT: Tensor | None, num_cached_B: Tensor | None, q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the document of each query, (B, T) int32, and of each key, (B, S) int32.

    Document 0 is the one that the cache belongs to.
    """
    B, T, S = *q.shape[:2], k.shape[1]
    if resets_BT is None:
        query_BT = torch.zeros(B, T, dtype=torch.int32, device=q.device)
    else:
        query_BT = resets_BT.cumsum(1, dtype=torch.int32)
    key_BS = F.pad(query_BT, (S - T, 0))
    if num_cached_B is not None:
        age_S = S - T - torch.arange(S, device=q.device)
        key_BS = key_BS.masked_fill(age_S > num_cached_B[:, None], NEVER)
    return query_BT, key_BS


def visible(query_BT: Tensor, key_BS: Tensor, window: int | None) -> Tensor:
    """Return the mask (B, T, S), bool: True where a query sees a key."""
    T, S = query_BT.shape[1], key_BS.shape[1]
    # How far back a key lies from a query; a negative distance is the future.
    back_TS = torch.arange(S - T, S, device=key_BS.device)[:, None] - torch.arange(
        S, device=key_BS.device
    )
    near_TS = back_TS >= 0 if window is None else (back_TS >= 0) & (back_TS < window)
    return near_TS & (query_BT[:, :, None] == key_BS[:, None, :])
