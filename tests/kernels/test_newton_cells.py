"""Cells: their Jacobians against jacfwd in float64, and what check_cell refuses."""

import pytest
import torch
from megarec_kernels.newton_rnn import Cell, ParaGRUCell, ParaLSTMCell, check_cell
from newton_cells import CELLS, DenseHead, Gated, make_inputs
from torch.func import jacfwd

CLOSED = {"gru": ParaGRUCell(), "lstm": ParaLSTMCell()}


def random_points(cell, number=20):
    """Return states, inputs and parameters up to 3, where gates saturate, too."""
    inputs = make_inputs(cell, B=number, T=1)
    params = {key: 6 * x for key, x in inputs["params"].items()}
    return 3 * inputs["state"], 1.5 * inputs["u"][:, 0], params


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_jacobians_are_those_of_jacfwd(cell):
    state_BKD, u_BVD, params = random_points(cell)
    new_BKD, found = cell.jacobian(state_BKD, u_BVD, params)
    assert torch.equal(new_BKD, cell.step(state_BKD, u_BVD, params))
    for row in range(len(state_BKD)):
        full_KDKD = jacfwd(lambda old, row=row: cell.step(old, u_BVD[row], params))(state_BKD[row])
        expected_KKD = torch.diagonal(full_KDKD, dim1=1, dim2=3)
        # Channels do not mix, nor do slots where the structure is diagonal.
        assert full_KDKD.count_nonzero() <= found[row].numel()
        if cell.structure == "diagonal":
            expected_KKD = torch.diagonal(expected_KKD, dim1=0, dim2=1).T
        torch.testing.assert_close(found[row], expected_KKD, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", CLOSED.values(), ids=CLOSED)
def test_the_automatic_jacobian_is_the_closed_form(cell):
    state, u, params = random_points(cell)
    new, closed = cell.jacobian(state, u, params)
    automatic_new, automatic = Cell.jacobian(cell, state, u, params)
    torch.testing.assert_close(automatic_new, new, rtol=0, atol=1e-14)
    torch.testing.assert_close(automatic, closed, rtol=0, atol=1e-13)


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_right_cells_pass(cell):
    check_cell(cell)


class NotDiagonal(DenseHead):
    structure = "diagonal"


class AcrossChannels(DenseHead):
    num_slots = num_inputs = 1
    recurrent = {}

    def step(self, state, u, params):
        return torch.tanh(state.mean(-1, keepdim=True) + u)


class Unknown(Gated):
    structure = "dense"


class OneSlotTooMany(Gated):
    num_slots = 3

    def step(self, state, u, params):
        return super().step(state[..., :2, :], u, params)


class MoreInputs(ParaGRUCell):
    num_inputs = 2


class MoreParameters(ParaLSTMCell):
    recurrent = {"A": 3}


class WrongForm(ParaGRUCell):
    def jacobian(self, state, u, params):
        new, slope = super().jacobian(state, u, params)
        return new, slope * (1 + 1e-6)


class WrongShape(ParaLSTMCell):
    def jacobian(self, state, u, params):
        new, slope = super().jacobian(state, u, params)
        return new, slope[..., 0, :, :]


class WrongState(ParaGRUCell):
    def jacobian(self, state, u, params):
        new, slope = super().jacobian(state, u, params)
        return 1.001 * new, slope


class NotANumber(ParaGRUCell):
    def jacobian(self, state, u, params):
        new, slope = super().jacobian(state, u, params)
        return new, slope / 0


class TwoOutputs(ParaLSTMCell):
    def output(self, state):
        return state


WRONG = {
    NotDiagonal: r"jacobian: differs .* structure 'diagonal', or its closed form, is wrong",
    AcrossChannels: r"jacobian: differs .* structure 'block', or its closed form, is wrong",
    Unknown: r"structure: got 'dense', expected 'diagonal' or 'block'",
    OneSlotTooMany: r"step: got shape \(3, 2, 4\), expected \(3, 3, 4\): 3 slots are declared",
    MoreInputs: r"fails for state \(3, 1, 4\), u \(3, 2, 4\), params \{'A': \(3, 4\)\}: ValueError",
    MoreParameters: r"fails for state .*, params \{'A': \(3, 4\)\}: KeyError\('C'\)",
    WrongForm: r"jacobian: differs from the derivative of step by .* along a random vector",
    WrongShape: r"jacobian: got shape \(3, 2, 4\), expected \(3, 2, 2, 4\): structure 'block'",
    WrongState: r"jacobian: new state: differs by .* from what step returns",
    NotANumber: r"jacobian: differs from the derivative of step by (nan|inf)",
    TwoOutputs: r"output: got shape \(3, 2, 4\), expected \(3, 4\): a number a channel",
}


@pytest.mark.parametrize("cell", WRONG, ids=lambda cell: cell.__name__)
def test_a_cell_that_is_not_what_it_declares_is_named(cell):
    with pytest.raises(ValueError, match=f"^{cell.__name__}: {WRONG[cell]}") as caught:
        check_cell(cell())
    assert "\n" not in str(caught.value)
