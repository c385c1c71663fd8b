"""The cells of ParaRNN (arXiv 2510.21450, eqs. 3.1a and 3.1b), with closed-form Jacobians."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megarec_kernels.newton_rnn.cell import Cell, Params


class ParaGRUCell(Cell):
    """h = (1 - z) h' + z n with gates z, r and candidate n of one channel each.

    params: A (3, D), the recurrent weights of z, r, n; u (..., 3, D) in the same order.
    """

    num_inputs: ClassVar[int] = 3
    recurrent: ClassVar[Mapping[str, int]] = {"A": 3}

    def step(self, state: Tensor, u: Tensor, params: Params) -> Tensor:
        """Return h (..., 1, D); see Cell."""
        return self._parts(state, u, params)[0][..., None, :]

    def jacobian(self, state: Tensor, u: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return h and dh / dh'; see Cell."""
        new, h, z, r, n = self._parts(state, u, params)
        a_z, a_r, a_n = params["A"].unbind(-2)
        through_n = z * (1 - n * n) * a_n * (r + h * a_r * r * (1 - r))
        slope = (1 - z) + (n - h) * a_z * z * (1 - z) + through_n
        return new[..., None, :], slope[..., None, :]

    @staticmethod
    def _parts(state: Tensor, u: Tensor, params: Params) -> tuple[Tensor, ...]:
        h = state[..., 0, :]
        a_z, a_r, a_n = params["A"].unbind(-2)
        u_z, u_r, u_n = u.unbind(-2)
        z = torch.sigmoid(torch.addcmul(u_z, a_z, h))
        r = torch.sigmoid(torch.addcmul(u_r, a_r, h))
        n = torch.tanh(torch.addcmul(u_n, a_n * h, r))
        return torch.lerp(h, n, z), h, z, r, n


class ParaLSTMCell(Cell):
    """Coupled gates and peepholes: c = f c' + (1 - f) m, h = o tanh(c); a state is (c, h).

    params: A (3, D), the recurrent weights of f, o and the candidate m; C (2, D), the peepholes of
    f (at c') and o (at c); u (..., 3, D) in A's order.
    """

    num_slots: ClassVar[int] = 2
    num_inputs: ClassVar[int] = 3
    recurrent: ClassVar[Mapping[str, int]] = {"A": 3, "C": 2}
    structure: ClassVar[Literal["diagonal", "block"]] = "block"

    def step(self, state: Tensor, u: Tensor, params: Params) -> Tensor:
        """Return (c, h) stacked, (..., 2, D); see Cell."""
        c, h, *_ = self._parts(state, u, params)
        return torch.stack([c, h], -2)

    def jacobian(self, state: Tensor, u: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return (c, h) and the 2 x 2 derivatives, rows new, columns old; see Cell."""
        c, h, f, m, o, t = self._parts(state, u, params)
        c_old, _ = state.unbind(-2)
        a_f, a_o, a_m = params["A"].unbind(-2)
        c_f, c_o = params["C"].unbind(-2)
        f_slope = (c_old - m) * f * (1 - f)
        cc = f + f_slope * c_f
        ch = f_slope * a_f + (1 - f) * (1 - m * m) * a_m
        o_slope, t_slope = t * o * (1 - o), o * (1 - t * t)
        through_c = o_slope * c_o + t_slope
        hc = through_c * cc
        hh = o_slope * a_o + through_c * ch
        return torch.stack([c, h], -2), torch.stack([cc, ch, hc, hh], -2).unflatten(-2, (2, 2))

    @staticmethod
    def _parts(state: Tensor, u: Tensor, params: Params) -> tuple[Tensor, ...]:
        c_old, h_old = state.unbind(-2)
        a_f, a_o, a_m = params["A"].unbind(-2)
        c_f, c_o = params["C"].unbind(-2)
        u_f, u_o, u_m = u.unbind(-2)
        f = torch.sigmoid(torch.addcmul(torch.addcmul(u_f, a_f, h_old), c_f, c_old))
        m = torch.tanh(torch.addcmul(u_m, a_m, h_old))
        c = torch.lerp(m, c_old, f)
        o = torch.sigmoid(torch.addcmul(torch.addcmul(u_o, a_o, h_old), c_o, c))
        t = torch.tanh(c)
        return c, o * t, f, m, o, t
