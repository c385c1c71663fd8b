"""Affine recurrence as a loop over tokens, differentiated by autograd."""

import torch
from torch import Tensor


def affine_scan_reference(A: Tensor, b_BTKD: Tensor, state_BKD: Tensor) -> Tensor:
    """Return h (B, T, K, D); A is (B, T, K, D) or (B, T, K, K, D)."""
    h_BKD = state_BKD
    hs_BKD = []
    for t in range(b_BTKD.shape[1]):
        if A.dim() == b_BTKD.dim():
            h_BKD = A[:, t] * h_BKD + b_BTKD[:, t]
        else:
            h_BKD = torch.einsum("bijd,bjd->bid", A[:, t], h_BKD) + b_BTKD[:, t]
        hs_BKD.append(h_BKD)
    return torch.stack(hs_BKD, 1)
