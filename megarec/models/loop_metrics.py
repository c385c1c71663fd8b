"""What a looped stack logs in training: the signs of how such models fail."""

from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional as F


class LoopMetrics:
    """Numbers of the loop, averaged over the micro-batches since they were last taken.

    `loop/recurrences`, and where tokens halt `loop/steps`, how many of them a token makes. Of the
    last latent state s_r `loop/token_correlation`, the mean cosine between different tokens of a
    row (near 1 all tokens are alike: the collapse of arXiv 2502.05171, section 4.3),
    `loop/residual`, |s_r - s_(r-1)| / |s_r|, and `loop/state_norm`, |s_r| a token.
    `loop/grad_norm/<j>` is the norm of the loss gradient at the j-th latest state, j = 1, 2, 4 and
    so on: what explodes or dies on the way back.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)

    def see(self, recurrence: int, num_recurrences: int, old: Tensor, new: Tensor) -> None:
        """Look at latent states (B, T, D) before and after a recurrence."""
        from_the_end = num_recurrences - recurrence
        if new.requires_grad and from_the_end.bit_count() == 1:
            # The hook must not hold the state itself.
            values = self._values[f"loop/grad_norm/{from_the_end}"]
            new.register_hook(lambda grad: values.append(grad.detach().norm()))
        if from_the_end > 1:
            return
        with torch.no_grad():
            dtype = torch.promote_types(new.dtype, torch.float32)
            old, new = old.to(dtype), new.to(dtype)
            norm_BT = new.norm(dim=-1)
            self._add("recurrences", torch.tensor(float(num_recurrences)))
            self._add("token_correlation", token_correlation(new).mean())
            self._add("residual", ((new - old).norm(dim=-1) / norm_BT).mean())
            self._add("state_norm", norm_BT.mean())

    def count(self, num_steps: Tensor | None) -> None:
        """Take how often each token has iterated; None where all always do."""
        if num_steps is not None:
            self._add("steps", num_steps.float().mean())

    def take(self) -> dict[str, float]:
        """Return the averages, and begin anew."""
        values, self._values = self._values, defaultdict(list)
        return {name: torch.stack(all_).mean().item() for name, all_ in values.items() if all_}

    def _add(self, name: str, value: Tensor) -> None:
        self._values[f"loop/{name}"].append(value)


def token_correlation(x_BTD: Tensor) -> Tensor:
    """Return the mean cosine between different tokens of each row, (B,); 0 for a single token."""
    T = x_BTD.shape[1]
    unit_BTD = F.normalize(x_BTD, dim=-1)
    # The sum of all cosines is |sum of unit vectors|^2; a token's with itself are T of them.
    total_B = unit_BTD.sum(1).square().sum(-1) - unit_BTD.square().sum((1, 2))
    return total_B / max(T * (T - 1), 1)
