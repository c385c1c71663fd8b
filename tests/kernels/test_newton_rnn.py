"""newton_rnn: any cell, forward and every gradient, against the walk over tokens in float64."""

import itertools

import pytest
import torch
from gla_cases import assert_close, cast
from hypothesis import given, settings
from hypothesis import strategies as st
from megarec_kernels.newton_rnn import Cell, Solver, newton_rnn
from newton_cells import CELLS, DenseHead, make_inputs
from op_cases import make_resets

EXACT = Solver(iterations=40, tolerance=1e-13, early_stop=True, on_failure="raise")
cells = pytest.mark.parametrize("name", CELLS)


def outputs_and_gradients(cell, inputs, **options):
    """Return the states, the last one and the gradients of a random function of both."""
    u, params = inputs["u"].clone(), {key: x.clone() for key, x in inputs["params"].items()}
    leaves = {"u": u, **params}
    if inputs.get("state") is not None:
        leaves["state"] = inputs["state"].clone()
    for leaf in leaves.values():
        leaf.requires_grad_()
    h, last, _ = newton_rnn(cell, u, params, state=leaves.get("state"), **options)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=rng).to(x.dtype) for x in (h, last)]
    gradients = torch.autograd.grad((h, last), list(leaves.values()), weights)
    results = {f"d{key}": g for key, g in zip(leaves, gradients, strict=True)}
    return results | {"h": h.detach(), "last": last.detach()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(CELLS)),
    B=st.integers(1, 3),
    T=st.integers(1, 20),
    D=st.integers(1, 4),
    carried=st.booleans(),
    reset_seed=st.none() | st.integers(0, 1000),
)
def test_any_shape(name, B, T, D, carried, reset_seed):
    cell, resets = CELLS[name], None
    if reset_seed is not None:
        resets = torch.rand(B, T, generator=torch.Generator().manual_seed(reset_seed)) < 0.3
    inputs = make_inputs(cell, B, T, D)
    if not carried:
        inputs["state"] = None
    expected = outputs_and_gradients(cell, inputs, resets=resets, backend="reference")
    actual = outputs_and_gradients(cell, inputs, resets=resets, solver=EXACT)
    assert_close(actual, expected, 1e-11)


@cells
def test_gradcheck(name):
    cell, inputs = CELLS[name], make_inputs(CELLS[name], T=3, D=1)
    resets = make_resets(2, 3, 2)

    def function(u, state, *values):
        params = dict(zip(cell.recurrent, values, strict=True))
        return newton_rnn(cell, u, params, state=state, resets=resets, solver=EXACT)[:2]

    leaves = [inputs["u"], inputs["state"], *inputs["params"].values()]
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in leaves])


@cells
def test_float32_and_bfloat16(name):
    cell, inputs = CELLS[name], make_inputs(CELLS[name], T=40)
    for dtype, bound, rounding in ((torch.float32, 2e-6, 0), (torch.bfloat16, 2e-6, 2**-8)):
        rounded = {key: inputs[key].to(dtype) for key in ("u", "state")}
        rounded["params"] = cast(inputs["params"], dtype)
        exact = {key: rounded[key].double() for key in ("u", "state")}
        exact["params"] = cast(rounded["params"], torch.float64)
        expected = outputs_and_gradients(cell, exact, backend="reference")
        actual = outputs_and_gradients(cell, rounded, solver=Solver(12, 1e-5))
        states = {key: actual.pop(key) for key in ("h", "last")}
        assert {x.dtype for x in states.values()} == {torch.float32}
        assert {x.dtype for x in actual.values()} == {dtype}
        assert_close(states, {key: expected.pop(key) for key in states}, bound)
        assert_close(actual, expected, bound + rounding)


@cells
@pytest.mark.parametrize("start", range(13))
def test_a_document_does_not_touch_the_next_one_bitwise(name, start):
    cell, inputs = CELLS[name], make_inputs(CELLS[name], dtype=torch.float32)
    resets = torch.zeros(2, 13, dtype=torch.bool)
    resets[:, start] = True
    other_u, results = inputs["u"].clone(), []
    other_u[:, :start] *= -3
    for backend in ("reference", "eager"):
        for u, state in ((inputs["u"], inputs["state"]), (other_u, -7 * inputs["state"])):
            u = u.clone().requires_grad_()
            h, last, report = newton_rnn(
                cell, u, inputs["params"], state=state, resets=resets, backend=backend,
                solver=Solver(4, tolerance=1.0),
            )  # fmt: skip
            assert not report.fell_back
            (du,) = torch.autograd.grad(h[:, start:].square().sum(), u)
            assert not du[:, :start].any()
            results.append([h[:, start:].detach(), last.detach(), du[:, start:]])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        results.clear()


@cells
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_packed_equals_alone(name, dtype, bound):
    cell, inputs = CELLS[name], make_inputs(CELLS[name], T=60, dtype=dtype)
    starts = [0, 17, 18, 41, 60]
    resets = torch.zeros(2, 60, dtype=torch.bool)
    resets[:, starts[:-1]] = True
    options = {"solver": Solver(12, 1e-5)}
    packed, last, _ = newton_rnn(
        cell, inputs["u"], inputs["params"], resets=resets, state=inputs["state"], **options
    )
    for start, end in itertools.pairwise(starts):
        alone, alone_last, _ = newton_rnn(
            cell, inputs["u"][:, start:end], inputs["params"], **options
        )
        assert_close({"h": packed[:, start:end]}, {"h": alone}, bound)
    assert_close({"last": last}, {"last": alone_last}, bound)


@cells
def test_pieces_with_a_carried_state_equal_the_whole(name):
    """The gradient through the state, too: that of early inputs is all from later pieces."""
    cell, inputs, results = CELLS[name], make_inputs(CELLS[name]), []
    resets = make_resets(2, 13, 0, 6)
    resets[1] = False
    for cuts in ((0, 13), (0, 1, 3, 4, 12, 13)):
        leaves = {key: inputs[key].clone().requires_grad_() for key in ("u", "state")}
        params = {key: x.clone().requires_grad_() for key, x in inputs["params"].items()}
        hs, state = [], leaves["state"]
        for start, end in itertools.pairwise(cuts):
            h, state, _ = newton_rnn(
                cell, leaves["u"][:, start:end], params, state=state,
                resets=resets[:, start:end], solver=EXACT,
            )  # fmt: skip
            hs.append(h)
        every = leaves | params
        gradients = torch.autograd.grad(hs[-1][:, -1].square().sum(), list(every.values()))
        results.append({"h": torch.cat(hs, 1).detach(), **dict(zip(every, gradients, strict=True))})
    assert_close(*results, 1e-11)
    assert results[0]["u"][1, :2].any() and results[0]["state"][1].any()
    assert not results[0]["u"][0, :6].any() and not results[0]["state"][0].any()


def test_keeping_the_last_state_does_not_keep_the_sequence():
    inputs = make_inputs(CELLS["lstm"], T=100)
    _, last, _ = newton_rnn(CELLS["lstm"], inputs["u"], inputs["params"])
    assert last.untyped_storage().nbytes() == last.numel() * last.element_size()


class Unused(Cell):
    """A cell with a parameter that the step does not touch."""

    recurrent = {"A": 1, "other": 2}

    def step(self, state, u, params):
        return torch.tanh(params["A"] * state + u)


def test_a_parameter_that_is_not_used_has_a_zero_gradient():
    results = outputs_and_gradients(Unused(), make_inputs(Unused()), solver=EXACT)
    assert results["dA"].all() and results["dother"].shape == (2, 3)
    assert not results["dother"].any()


def test_only_what_needs_a_gradient_gets_one():
    cell, inputs = CELLS["gru"], make_inputs(CELLS["gru"])
    A = inputs["params"]["A"].requires_grad_()
    h, _, _ = newton_rnn(cell, inputs["u"], {"A": A})
    h.sum().backward()
    assert A.grad.all() and inputs["u"].grad is None


def test_the_caller_may_not_change_states_that_the_backward_needs():
    cell, inputs = CELLS["gru"], make_inputs(CELLS["gru"])
    u = inputs["u"].requires_grad_()
    h, last, _ = newton_rnn(cell, u, inputs["params"], solver=EXACT)
    (expected,) = torch.autograd.grad(h.sum() + 0 * last.sum(), u, retain_graph=True)
    last.detach().zero_()
    (again,) = torch.autograd.grad(h.sum(), u, retain_graph=True)
    assert torch.equal(again, expected)
    h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_one_token_is_a_step():
    cell, inputs = CELLS["lstm"], make_inputs(CELLS["lstm"], T=1)
    h, last, report = newton_rnn(cell, inputs["u"], inputs["params"], state=inputs["state"])
    expected = cell.step(inputs["state"], inputs["u"][:, 0], inputs["params"])
    assert torch.equal(h[:, 0], expected) and torch.equal(last, expected)
    assert report.residuals == [] and report.iterations == 0 and not report.fell_back


def test_a_chaotic_recurrence_falls_back_or_raises():
    """Weights of up to 4 make tanh units chaotic, and Newton diverges: the walk is returned."""
    cell, inputs = DenseHead(), make_inputs(DenseHead(), T=40)
    inputs["params"]["R"] *= 8
    h, _, report = newton_rnn(cell, inputs["u"], inputs["params"])
    walk, _, _ = newton_rnn(cell, inputs["u"], inputs["params"], backend="reference")
    assert report.fell_back and report.residuals[-1] > 1e-3 and torch.equal(h, walk)
    with pytest.raises(ArithmeticError, match=r"DenseHead: residual .* after 3 iterations"):
        newton_rnn(cell, inputs["u"], inputs["params"], solver=Solver(on_failure="raise"))


@cells
@pytest.mark.parametrize("on_failure", ["sequential", "raise"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["u", "params", "state"])
def test_inputs_that_are_not_finite_pass_through(name, on_failure, value, where):
    """Whoever trains has a policy for them; the other rows are as they would be without."""
    cell, inputs = CELLS[name], make_inputs(CELLS[name])
    clean, _, _ = newton_rnn(cell, **inputs, backend="reference")
    if where == "params":
        inputs["params"] = {key: torch.full_like(x, value) for key, x in inputs["params"].items()}
    else:
        inputs[where][0] = value
    inputs["u"].requires_grad_()
    solver = Solver(8, tolerance=1e-12, on_failure=on_failure)
    h, _, report = newton_rnn(cell, **inputs, solver=solver)
    walk, _, _ = newton_rnn(cell, **inputs, backend="reference")
    torch.testing.assert_close(h, walk, rtol=0, atol=1e-9, equal_nan=True)
    if value != value:
        assert report.fell_back and report.residuals[-1] == torch.inf
        assert h[0].isnan().any()
    if where != "params":
        torch.testing.assert_close(h[1], clean[1], rtol=0, atol=1e-9)
    h.sum().backward()


def test_an_infinite_tolerance_takes_what_is_finite():
    cell, inputs = DenseHead(), make_inputs(DenseHead(), T=40)
    inputs["params"]["R"] *= 8
    for early_stop in (False, True):
        solver = Solver(1, torch.inf, early_stop=early_stop)
        h, _, report = newton_rnn(cell, **inputs, solver=solver)
        assert not report.fell_back and h.isfinite().all() and report.residuals[-1] > 0.1
        spoiled = inputs | {"u": inputs["u"].clone()}
        spoiled["u"][0, 20] = torch.nan
        h, _, report = newton_rnn(cell, **spoiled, solver=solver)
        walk, _, _ = newton_rnn(cell, **spoiled, backend="reference")
        assert report.fell_back and report.residuals[-1] == torch.inf
        assert torch.equal(h[1], walk[1])


class Root(Cell):
    """A step whose derivative is not finite at the zero state."""

    def step(self, state, u, params):
        return 0.5 * state.abs().sqrt() + u


class Pole(Cell):
    """A step that is not finite although what it is given is."""

    def step(self, state, u, params):
        return u / (state + u - u)


@pytest.mark.parametrize("cell", [Root(), Pole()], ids=["Jacobian", "step"])
@pytest.mark.parametrize("on_failure", ["sequential", "raise"])
def test_a_cell_that_is_not_finite_for_finite_inputs_is_named(cell, on_failure):
    inputs = make_inputs(cell)
    message = f"newton_rnn: {type(cell).__name__}: step or its Jacobian is not finite"
    with pytest.raises(FloatingPointError, match=message):
        newton_rnn(cell, inputs["u"], {}, solver=Solver(on_failure=on_failure))


GRU = make_inputs(CELLS["gru"])
BAD = {
    "u dims": ({"u": torch.zeros(2, 3)}, r"u: got shape \(2, 3\), expected \(B, T, 3, D\)"),
    "no token": ({"u": torch.zeros(2, 0, 3, 3)}, r"u: got .* with at least one token"),
    "inputs": ({"u": torch.zeros(2, 13, 2, 3)}, r"u: got .*, expected \(B, T, 3, D\)"),
    "u dtype": ({"u": torch.zeros(2, 13, 3, 3).long()}, r"u: got torch.int64, expected a float"),
    "missing": ({"params": {}}, r"params: got keys \[\], expected \['A'\]"),
    "another": (
        {"params": GRU["params"] | {"C": torch.zeros(2, 3)}},
        r"params: got keys \['A', 'C'\], expected \['A'\]",
    ),
    "rows": (
        {"params": {"A": torch.zeros(2, 3)}},
        r"params\['A'\]: got shape \(2, 3\), expected \(3, 3\)",
    ),
    "state": ({"state": torch.zeros(2, 3)}, r"state: got shape \(2, 3\), expected \(2, 1, 3\)"),
    "resets": ({"resets": torch.zeros(2, 13)}, r"resets: got torch.float32 .*torch.bool \(2, 13\)"),
    "backend": ({"backend": "cuda"}, r"backend: got 'cuda', expected one of 'auto'"),
    "gpu": ({"backend": "gpu"}, r"backend='gpu' is not built yet"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_argument(change, message):
    with pytest.raises(ValueError, match=f"^newton_rnn: {message}"):
        newton_rnn(CELLS["gru"], **(GRU | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "iterations: got 0, expected at least 1"),
        ({"iterations": -1}, "iterations: got -1, expected at least 1"),
        ({"tolerance": 0.0}, "tolerance: got 0.0, expected more than 0"),
        ({"tolerance": torch.nan}, "tolerance: got nan, expected more than 0"),
        ({"on_failure": "warn"}, "on_failure: got 'warn', expected 'sequential' or 'raise'"),
    ],
)
def test_bad_solver(change, message):
    with pytest.raises(ValueError, match=f"^newton_rnn: {message}"):
        Solver(**change)
