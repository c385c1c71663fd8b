"""newton_rnn and the ParaRNN cells against vectors made with the published reference code."""

import pytest
import torch
from megarec_kernels.newton_rnn import Solver, newton_rnn
from newton_cells import Golden

FILES = (
    "paragru_T37",
    "paragru_T256",
    "paragru_medium_T256",
    "paralstm_T37",
    "paralstm_T256",
)
EASY = tuple(name for name in FILES if "medium" not in name)
EXACT = Solver(iterations=8, tolerance=1e-12)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("name", FILES)
def test_states_and_every_gradient_in_float64(name, backend):
    golden = Golden(name)
    results, report = golden.run(torch.float64, solver=EXACT, backend=backend)
    assert not report.fell_back
    expected = {"y": golden["y"]} | {f"d{key}": golden[f"d{key}"] for key in golden.leaves}
    assert set(expected) | {"h"} == set(results)
    for key, value in expected.items():
        torch.testing.assert_close(results[key], value, rtol=0, atol=1e-12)
    if "c" in golden.arrays:
        torch.testing.assert_close(results["h"][:, :, 0], golden["c"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FILES)
def test_residuals_after_each_iteration(name):
    """With the exact Jacobian; the reference's LSTM takes the output gate at another state."""
    golden = Golden(name)
    expected = golden["newton_residual_inf_exactJ"].tolist()
    errors = golden["newton_err_inf_exactJ"].tolist()
    states = [golden[key] for key in ("c", "y") if key in golden.arrays]
    for iterations, residual, error in zip(golden["newton_its"], expected, errors, strict=True):
        # Stopping at once, where there is nothing to iterate, returns the initial guess.
        solver = Solver(max(1, int(iterations)), torch.inf, early_stop=int(iterations) == 0)
        results, report = golden.run(torch.float64, solver=solver)
        assert report.iterations == iterations
        assert report.residuals[-1] == pytest.approx(residual, abs=1e-9)
        difference = (results["h"] - torch.stack(states, 2)).abs().max().item()
        assert difference == pytest.approx(error, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "iterations"),
    # Of the LSTM only the guess: its reference takes the output gate's slope at the old c.
    [("paragru_T37", 0), ("paragru_T37", 1), ("paragru_T37", 2), ("paragru_T37", 3)]
    + [("paralstm_T37", 0)],
)
def test_iterates(name, iterations):
    golden = Golden(name)
    solver = Solver(max(1, iterations), torch.inf, early_stop=iterations == 0)
    results, _ = golden.run(torch.float64, solver=solver)
    expected = golden[f"newton_state_k{iterations}"]
    torch.testing.assert_close(results["h"].flatten(-2), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", EASY)
def test_float32(name):
    golden = Golden(name)
    for iterations, bound in ((3, 1e-4), (4, 1e-6)):
        results, report = golden.run(torch.float32, solver=Solver(iterations))
        assert not report.fell_back and report.iterations == iterations
        assert (results["y"] - golden["y"]).abs().max() <= bound
    for key in golden.leaves:
        error = (results[f"d{key}"] - golden[f"d{key}"]).abs().max()
        assert error <= 1e-5 * golden[f"d{key}"].abs().max()


@pytest.mark.parametrize("name", EASY)
def test_bfloat16_inputs_give_float32_states(name):
    golden = Golden(name)
    results, _ = golden.run(torch.bfloat16)
    assert results["y"].dtype == torch.float32 and results["dx"].dtype == torch.bfloat16
    assert (results["y"] - golden["y"]).abs().max() <= 1e-2


def test_three_iterations_do_not_solve_larger_weights():
    golden = Golden("paragru_medium_T256")
    # Jacobians above 1 magnify what u is off by: round it once, not at each step of its map.
    results, report = golden.run(torch.float32, map_dtype=torch.float64, solver=Solver(3))
    assert report.fell_back and report.residuals[-1] > 1e-2
    assert (results["y"] - golden["y"]).abs().max() <= 4e-7
    for key in golden.leaves:
        error = (results[f"d{key}"] - golden[f"d{key}"]).abs().max()
        assert error <= 1e-5 * golden[f"d{key}"].abs().max()
    message = (
        r"newton_rnn: ParaGRUCell: residual 0\.067 after 3 iterations, expected at most 0\.001"
    )
    with pytest.raises(ArithmeticError, match=message):
        golden.run(torch.float32, solver=Solver(3, on_failure="raise"))


@pytest.mark.parametrize("name", FILES)
def test_as_many_iterations_as_the_tolerance_asks_for(name):
    golden = Golden(name)
    trace = golden.run(torch.float64, solver=Solver(8, torch.inf))[1].residuals
    for tolerance in (1e-1, 1e-3, 1e-6, 1e-10):
        solver = Solver(40, tolerance, early_stop=True)
        results, report = golden.run(torch.float64, solver=solver)
        needed = next(k for k, residual in enumerate(trace) if residual <= tolerance)
        assert report.iterations == needed and report.residuals == trace[: needed + 1]
        assert not report.fell_back
    assert (results["y"] - golden["y"]).abs().max() <= 1e-8


def test_the_last_state_continues_the_sequence():
    golden = Golden("paralstm_T37")
    results, _ = golden.run(torch.float64, solver=EXACT)
    x_BTHI = golden["x"].unflatten(-1, (2, 8))
    u = torch.einsum("bthi,hivd->btvhd", x_BTHI, golden["B"]).flatten(-2) + golden["b"]
    params = {"A": golden["A"], "C": golden["C"]}
    _, state, _ = newton_rnn(golden.cell, u[:, :20], params, solver=EXACT)
    h, last, _ = newton_rnn(golden.cell, u[:, 20:], params, state=state, solver=EXACT)
    torch.testing.assert_close(h, results["h"][:, 20:], rtol=0, atol=1e-12)
    assert torch.equal(last, h[:, -1])
