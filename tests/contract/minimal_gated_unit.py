"""A minimal gated unit (arXiv 1603.09420) as a mixer: the example cell of CONTRIBUTING.md."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from megarec_kernels.newton_rnn import Cell
from torch import Tensor

from megarec.models.mixers.para_rnn import NewtonMixerConfig


class MinimalGatedUnit(Cell):
    """h = (1 - f) h' + f m, with one gate f and a candidate m; each channel by itself."""

    num_inputs: ClassVar[int] = 2
    recurrent: ClassVar[Mapping[str, int]] = {"A": 2}

    def step(self, state: Tensor, u: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Return the new state (..., 1, D); see Cell."""
        (a_f, a_m), (u_f, u_m) = params["A"].unbind(-2), u.unbind(-2)
        h = state[..., 0, :]
        f = torch.sigmoid(a_f * h + u_f)
        m = torch.tanh(a_m * f * h + u_m)
        return ((1 - f) * h + f * m)[..., None, :]


class MGUConfig(NewtonMixerConfig):
    """Config of the mixer around the cell; all options are those of any such mixer."""

    type: Literal["mgu"] = "mgu"
    cell: ClassVar[Cell] = MinimalGatedUnit()
