"""Tables of RoPE's angles, which some architectures keep among their weights."""

import torch
from torch import Tensor

from megarec.errors import UserError
from megarec.models.rotary import RotaryConfig, rotation


def rope_table(rope: RotaryConfig, head_dim: int, num_positions: int) -> Tensor:
    """Return cos and sin of all positions, (1, num_positions, 1, head_dim / 2, 2) in float32."""
    angles = rotation(rope, head_dim, torch.arange(num_positions), torch.float32)
    return angles.permute(1, 2, 3, 0)[None].contiguous()


def check_rope_table(
    name: str, table: Tensor, rope: RotaryConfig, head_dim: int, num_positions: int
) -> None:
    """Compare a table of a file with what it must be, as far as float32 and its own dtype go.

    Raises:
        UserError: another shape or other angles; the message begins with `name`.
    """
    expected = rope_table(rope, head_dim, num_positions)
    if table.shape != expected.shape:
        raise UserError(
            f"{name}: shape {list(table.shape)}, expected {list(expected.shape)} of "
            f"{num_positions} positions and head_dim={head_dim}"
        )
    # An angle's error grows with it; frequencies may have been rounded in another order.
    position = torch.arange(num_positions).view(1, -1, 1, 1, 1)
    allowed = 8 * torch.finfo(torch.float32).eps * (1 + position) + torch.finfo(table.dtype).eps
    # Not the other way round: a NaN must fail.
    wrong = ~((table.float() - expected).abs() <= allowed)
    if wrong.any():
        raise UserError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} values differ from cos and sin of "
            f"position * {rope.base:g}^(-2r / {head_dim}); the table is of another RoPE"
        )
