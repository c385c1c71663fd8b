"""gated_linear_attention: every form, forward and gradients, against the float64 reference."""

import itertools

import pytest
import torch
from gla_cases import (
    assert_close,
    cast,
    make_inputs,
    make_state,
    outputs_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from megarec_kernels.gated_linear_attention import (
    gated_linear_attention,
    gated_linear_attention_step,
    initial_state,
)

MODES = [
    pytest.param(gate, normalize, id=f"{gate}-{'normalized' if normalize else 'sum'}")
    for gate, normalize in itertools.product(("exp", "plain"), (False, True))
]
modes = pytest.mark.parametrize(("gate", "normalize"), MODES)


def parallel_mlstm(q, k, v, log_f, log_i, m0):
    """The mLSTM's quadratic form from the zero state, written from its equations."""
    b = log_f.cumsum(1)  # (B, T, H)
    D = b[:, :, None] - b[:, None] + log_i[:, None]  # (B, T, S, H)
    future = torch.ones(D.shape[1:3], dtype=torch.bool).triu(1)[None, :, :, None]
    D = D.masked_fill(future, -torch.inf)
    m = torch.maximum(D.amax(2), b + m0)
    P = torch.einsum("bthd,bshd->btsh", q * q.shape[-1] ** -0.5, k) * (D - m[:, :, None]).exp()
    den = torch.maximum(P.sum(2).abs(), (-m).exp()) + 1e-6
    return torch.einsum("btsh,bshd->bthd", P, v) / den[..., None]


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_equals_the_parallel_form_of_the_mlstm(backend):
    inputs = make_inputs(T=40)
    y, _, _ = gated_linear_attention(**inputs, normalize=True, chunk_size=16, backend=backend)
    torch.testing.assert_close(y, parallel_mlstm(**inputs, m0=0.0), rtol=0, atol=1e-12)


@modes
def test_gradcheck_of_the_reference(gate, normalize):
    inputs = make_inputs(B=1, T=4, G=1, H=2, Dk=2, Dv=2)
    state = make_state(inputs, gate, normalize)
    m = {key: state.pop(key) for key in list(state) if key == "m"}

    def function(*tensors):
        values = dict(zip((*inputs, *state), tensors, strict=True))
        carried = {key: values.pop(key) for key in state}
        y, final, log_decay = gated_linear_attention(
            **values, state=carried | m, gate=gate, normalize=normalize, backend="reference"
        )
        # In plain units the outputs do not depend on m, which is a constant to autograd.
        unit = final["m"].exp() if gate == "exp" else torch.ones_like(log_decay)
        return y, final["C"] * unit[..., None, None], log_decay

    leaves = [x.requires_grad_() for x in (*inputs.values(), *state.values())]
    assert torch.autograd.gradcheck(function, leaves)


CASES = {
    "one token": {"T": 1},
    "shorter than a chunk": {"T": 5},
    "odd length": {"T": 19},
    "whole chunks": {"T": 16},
    "one head, one row": {"T": 11, "B": 1, "G": 1, "H": 1},
    "groups": {"T": 11, "G": 2, "H": 6},
    "one group": {"T": 9, "G": 1, "H": 3},
}


@modes
@pytest.mark.parametrize("carried", [False, True], ids=["zero state", "carried state"])
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
def test_eager_equals_the_reference(shape, carried, gate, normalize):
    inputs = make_inputs(**shape)
    state = make_state(inputs, gate, normalize) if carried else None
    options = {"gate": gate, "normalize": normalize, "chunk_size": 8}
    expected = outputs_and_gradients(inputs, state, backend="reference", **options)
    actual = outputs_and_gradients(inputs, state, backend="eager", **options)
    assert_close(actual, expected, 1e-12)
    if state is not None:
        state = cast(state, torch.float32)
    single = outputs_and_gradients(cast(inputs, torch.float32), state, **options)
    assert_close(single, expected, 2e-5)


@modes
@pytest.mark.parametrize("position", [0, 1, 7, 8, 9, 15, 16])
def test_reset_at_every_place_of_a_chunk(position, gate, normalize):
    inputs = make_inputs(T=17, B=3)
    resets = torch.zeros(3, 17, dtype=torch.bool)
    resets[0, position] = True  # one reset; none in row 1; several in row 2
    resets[2, [0, 2, 3, position]] = True
    state = make_state(inputs, gate, normalize)
    options = {"gate": gate, "normalize": normalize, "chunk_size": 8, "resets": resets}
    expected = outputs_and_gradients(inputs, state, backend="reference", **options)
    assert_close(outputs_and_gradients(inputs, state, **options), expected, 1e-12)
    assert expected["log_decay"].isinf().all(1).tolist() == [True, False, True]


# Gates of 1e4 overflow the sum itself, unless the stabiliser and the normaliser share the unit.
EXTREMES = [
    (*mode.values, log_f, log_i)
    for mode in MODES
    for log_f in (-1e4, -25.0, 1e4, None)
    for log_i in (-1e4, 1e4, None)
    if 1e4 not in (log_f, log_i) or mode.values == ("exp", True)
]


@pytest.mark.parametrize(("gate", "normalize", "log_f", "log_i"), EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_gates_give_nothing_non_finite_of_their_own(gate, normalize, log_f, log_i, dtype):
    inputs = make_inputs(T=20, dtype=dtype)
    if log_f is not None:
        inputs["log_f"][:, [3, 12, 13]] = log_f
    if log_i is not None:
        inputs["log_i"][:, [2, 9, 16]] = log_i
    options = {"gate": gate, "normalize": normalize, "chunk_size": 8}
    expected = outputs_and_gradients(
        cast(inputs, torch.float64), None, backend="reference", **options
    )
    assert all(x.isfinite().all() for x in expected.values())
    actual = outputs_and_gradients(inputs, None, **options)
    assert all(x.isfinite().all() for x in actual.values())
    if dtype is torch.float64:
        assert_close(actual, expected, 1e-8)
    elif log_i is None and log_f == -25.0:  # float32 knows a sum of gates near 1e4 to 1e-3 only
        assert_close(actual, expected, 5e-5)


@modes
@pytest.mark.parametrize("value", [-1e4, 0.0, 1e4])
def test_a_document_does_not_touch_the_next_one_bitwise(value, gate, normalize):
    inputs = make_inputs(T=24, G=1, dtype=torch.float32)
    start = 11  # inside a chunk
    resets = torch.zeros(2, 24, dtype=torch.bool)
    resets[:, start] = True
    state = make_state(inputs, gate, normalize)
    other = {key: x.clone() for key, x in inputs.items()}
    for key in ("q", "k", "v"):
        other[key][:, :start] *= -3
    for key in ("log_f", "log_i"):
        other[key][:, :start] = value
    for backend in ("reference", "eager"):
        options = {"resets": resets, "gate": gate, "normalize": normalize, "chunk_size": 8}
        y, final, _ = gated_linear_attention(**inputs, state=None, backend=backend, **options)
        y2, final2, _ = gated_linear_attention(**other, state=state, backend=backend, **options)
        assert torch.equal(y[:, start:], y2[:, start:])
        assert all(torch.equal(final[key], final2[key]) for key in final)
        assert not torch.equal(y[:, :start], y2[:, :start])


@modes
@pytest.mark.parametrize("value", [-1e4, 0.5])
def test_gradients_stay_in_their_document_bitwise(value, gate, normalize):
    inputs = make_inputs(T=24, dtype=torch.float32)
    start = 11
    resets = torch.zeros(2, 24, dtype=torch.bool)
    resets[:, start] = True
    other = {key: x.clone() for key, x in inputs.items()}
    other["log_f"][:, :start] = value
    other["v"][:, :start] *= 100

    def later_gradients(values):
        leaves = [x.clone().requires_grad_() for x in values.values()]
        y, _, _ = gated_linear_attention(
            *leaves, resets=resets, gate=gate, normalize=normalize, chunk_size=8
        )
        return [g[:, start:] for g in torch.autograd.grad(y.square().sum(), leaves)]

    for a, b in zip(later_gradients(inputs), later_gradients(other), strict=True):
        assert torch.equal(a, b)


@modes
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["f32", "f64"]
)
def test_packed_equals_alone(dtype, tolerance, gate, normalize):
    inputs = make_inputs(T=150, dtype=dtype)
    starts = [0, 37, 38, 101, 150]
    resets = torch.zeros(2, 150, dtype=torch.bool)
    resets[:, starts[:-1]] = True
    options = {"gate": gate, "normalize": normalize}
    packed, final, _ = gated_linear_attention(**inputs, resets=resets, **options)
    for start, end in itertools.pairwise(starts):
        part = {key: x[:, start:end] for key, x in inputs.items()}
        alone, alone_final, _ = gated_linear_attention(**part, **options)
        assert_close({"y": packed[:, start:end]}, {"y": alone}, tolerance)
    assert_close(final, alone_final, tolerance)


@modes
def test_chunk_size_does_not_matter(gate, normalize):
    inputs = make_inputs(T=30)
    options = {"gate": gate, "normalize": normalize}
    whole = outputs_and_gradients(inputs, None, chunk_size=1000, **options)
    for chunk_size in (1, 4, 7, 29, 30):
        chunked = outputs_and_gradients(inputs, None, chunk_size=chunk_size, **options)
        assert_close(chunked, whole, 1e-12)


@modes
def test_carried_state_equals_the_whole_sequence(gate, normalize):
    inputs = make_inputs(T=30)
    options = {"gate": gate, "normalize": normalize, "chunk_size": 8}
    y, final, log_decay = gated_linear_attention(**inputs, **options)
    state, ys, decays = None, [], []
    for start, end in ((0, 13), (13, 14), (14, 30)):
        part = {key: x[:, start:end] for key, x in inputs.items()}
        part_y, state, decay = gated_linear_attention(**part, state=state, **options)
        ys.append(part_y)
        decays.append(decay)
    assert_close({"y": torch.cat(ys, 1)} | state, {"y": y} | final, 1e-12)
    torch.testing.assert_close(sum(decays), log_decay)


@modes
def test_step_by_step_equals_the_sequence(gate, normalize):
    inputs = make_inputs(T=12, G=1, H=3)
    y, final, _ = gated_linear_attention(**inputs, gate=gate, normalize=normalize, chunk_size=8)
    state = initial_state(2, 3, 3, 4, gate=gate, normalize=normalize, dtype=torch.float64)
    for t in range(12):
        y_t, state = gated_linear_attention_step(
            *(x[:, t] for x in inputs.values()), state=state, gate=gate, normalize=normalize
        )
        torch.testing.assert_close(y_t, y[:, t], rtol=0, atol=1e-12)
    assert_close(state, final, 1e-12)


@modes
def test_no_input_gate_is_an_input_gate_of_one(gate, normalize):
    inputs = make_inputs(T=11)
    without = {key: x for key, x in inputs.items() if key != "log_i"}
    ones = inputs | {"log_i": torch.zeros_like(inputs["log_i"])}
    for backend in ("reference", "eager"):
        options = {"gate": gate, "normalize": normalize, "chunk_size": 4, "backend": backend}
        y, final, _ = gated_linear_attention(**without, **options)
        y1, final1, _ = gated_linear_attention(**ones, **options)
        assert_close({"y": y} | final, {"y": y1} | final1, 0.0)


def test_scale_multiplies_the_queries():
    inputs = make_inputs(T=11)
    scaled = inputs | {"q": inputs["q"] * -0.7}
    expected = outputs_and_gradients(scaled, None, scale=1.0, normalize=True, chunk_size=4)
    actual = outputs_and_gradients(inputs, None, scale=-0.7, normalize=True, chunk_size=4)
    expected["dq"] = expected["dq"] * -0.7
    assert_close(actual, expected, 1e-12)


@modes
def test_bf16_inputs_compute_in_float32(gate, normalize):
    """y is the float64 result of the rounded inputs, rounded: 2^-8 relative to its size."""
    inputs = make_inputs(T=40)
    for key in ("q", "k", "v"):
        inputs[key] = inputs[key].bfloat16()
    for key in ("log_f", "log_i"):
        inputs[key] = inputs[key].float()
    options = {"gate": gate, "normalize": normalize, "chunk_size": 16}
    actual = outputs_and_gradients(inputs, None, **options)
    expected = outputs_and_gradients(cast(inputs, torch.float64), None, **options)
    assert actual["y"].dtype == actual["dq"].dtype == torch.bfloat16
    assert actual["final.C"].dtype == actual["dlog_f"].dtype == torch.float32
    final = {key: x for key, x in actual.items() if key.startswith("final")}
    assert_close(final, {key: expected[key] for key in final}, 1e-5)
    assert_close(actual, expected, 2**-7)


def test_inside_activation_checkpointing():
    inputs = [x.float().requires_grad_() for x in make_inputs(T=20).values()]

    def function(*tensors):
        return gated_linear_attention(*tensors, normalize=True, chunk_size=8)[0]

    plain = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    y = torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)
    for a, b in zip(plain, torch.autograd.grad(y.square().sum(), inputs), strict=True):
        assert torch.equal(a, b)


def test_the_final_state_is_the_callers_to_change():
    inputs = [x.requires_grad_() for x in make_inputs(T=20).values()]
    y, _, _ = gated_linear_attention(*inputs, chunk_size=8)
    expected = torch.autograd.grad(y.sum(), inputs)
    y, final, _ = gated_linear_attention(*inputs, chunk_size=8)
    final["C"].detach().zero_()
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), expected, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 20),
    G=st.integers(1, 2),
    ratio=st.integers(1, 3),
    Dk=st.integers(1, 4),
    Dv=st.integers(1, 4),
    chunk_size=st.integers(1, 24),
    gate=st.sampled_from(["exp", "plain"]),
    normalize=st.booleans(),
    carried=st.booleans(),
    reset_seed=st.none() | st.integers(0, 1000),
)
def test_any_shape(
    B, T, G, ratio, Dk, Dv, chunk_size, gate, normalize, carried, reset_seed
):  # fmt: skip
    inputs = make_inputs(B=B, T=T, G=G, H=G * ratio, Dk=Dk, Dv=Dv)
    state = make_state(inputs, gate, normalize) if carried else None
    resets = None
    if reset_seed is not None:
        rng = torch.Generator().manual_seed(reset_seed)
        resets = torch.rand(B, T, generator=rng) < 0.3
    options = {
        "resets": resets,
        "gate": gate,
        "normalize": normalize,
        "chunk_size": chunk_size,
    }
    expected = outputs_and_gradients(inputs, state, backend="reference", **options)
    assert_close(outputs_and_gradients(inputs, state, **options), expected, 1e-10)
