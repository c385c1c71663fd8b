"""causal_conv1d: every form, forward, tail and gradients, against the float64 reference."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from gla_cases import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from megarec_kernels.causal_conv1d import causal_conv1d
from op_cases import compare, make_resets, outputs_and_gradients, random_inputs
from torch.utils.checkpoint import checkpoint

# In bfloat16 what is left is rounding, 2^-8 at most: of what y gives to a gradient, of what the
# tail gives, and of their sum. All else is computed in float32.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3 * 2**-8}


def make_inputs(B=2, T=9, C=3, K=4, bias=True, tail=True, dtype=torch.float64, seed=0):
    shapes = {"x": (B, T, C), "weight": (C, K)}
    shapes |= {"bias": (C,)} if bias else {}
    shapes |= {"tail": (B, K - 1, C)} if tail else {}
    return random_inputs(shapes, dtype, seed)


def run(**arguments):
    y, tail = causal_conv1d(**arguments)
    return {"y": y, "tail after": tail}


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_equals_torchs_convolution(backend, T):
    inputs = make_inputs(T=T)
    whole = torch.cat([inputs["tail"], inputs["x"]], 1)
    weight = inputs["weight"][:, None]
    expected = F.conv1d(whole.mT, weight, inputs["bias"], groups=3).mT
    y, tail = causal_conv1d(**inputs, backend=backend)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert torch.equal(tail, whole[:, -3:])
    silu, _ = causal_conv1d(**inputs, activation="silu", backend=backend)
    torch.testing.assert_close(silu, F.silu(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_the_last_weight_is_of_the_present_token(backend):
    x = torch.tensor([1.0, 10.0, 100.0])[None, :, None]
    weight = torch.tensor([[3.0, 5.0]])
    resets = torch.tensor([[False, False, True]])
    y, tail = causal_conv1d(x, weight, backend=backend)
    assert y.flatten().tolist() == [5, 53, 530] and tail.item() == 100
    tail = torch.tensor([[[-1.0]]])
    y, tail = causal_conv1d(x, weight, torch.ones(1), resets=resets, tail=tail, backend=backend)
    assert y.flatten().tolist() == [3, 54, 501] and tail.item() == 100


def test_gradcheck_of_the_reference():
    inputs = make_inputs(T=4, C=2, K=3)
    resets = make_resets(2, 4, 2)

    def function(*leaves):
        arguments = dict(zip(inputs, leaves, strict=True))
        return causal_conv1d(**arguments, resets=resets, activation="silu", backend="reference")

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()])


CASES = {
    "one token": {"T": 1},
    "shorter than the kernel": {"T": 2},
    "as long as the kernel": {"T": 4},
    "odd length": {"T": 19},
    "kernel 1": {"K": 1},
    "kernel 2": {"K": 2},
    "longer kernel": {"K": 7, "T": 5},
    "one channel, one row": {"B": 1, "C": 1},
}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("bias", "tail"), itertools.product((False, True), repeat=2), ids=["", "tail", "bias", "both"]
)
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
def test_eager_equals_the_reference(shape, bias, tail, activation):
    compare(run, make_inputs(**shape, bias=bias, tail=tail), BOUNDS, activation=activation)


@pytest.mark.parametrize(
    "starts", [[0], [1], [4], [8], [0, 1], [3, 4], [3, 5], [0, 1, 2, 3], [7, 8]], ids=str
)
@pytest.mark.parametrize("K", [1, 2, 4])
def test_resets_at_every_place(K, starts):
    compare(
        run, make_inputs(K=K, B=3), BOUNDS, resets=make_resets(3, 9, *starts), activation="silu"
    )


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_document_does_not_touch_the_next_one_bitwise(backend):
    inputs = make_inputs(dtype=torch.float32)
    for start in range(9):
        resets = torch.zeros(2, 9, dtype=torch.bool)
        resets[:, start] = True
        other = {name: x.clone() for name, x in inputs.items()}
        # Not even a value that would spoil all it touches.
        other["x"][:, :start] = torch.nan
        other["tail"][:] = torch.nan
        for activation in (None, "silu"):
            options = {"resets": resets, "activation": activation, "backend": backend}
            y, tail = causal_conv1d(**inputs, **options)
            y2, tail2 = causal_conv1d(**other, **options)
            assert torch.equal(y[:, start:], y2[:, start:])
            assert torch.equal(tail, tail2)
            assert not tail[:, : max(0, start - 6)].any()


def test_gradients_stay_in_their_document_bitwise():
    inputs = make_inputs(dtype=torch.float32)
    resets = make_resets(2, 9, 4)
    resets[1] = resets[0]
    other = inputs | {"x": inputs["x"].clone()}
    other["x"][:, :4] *= -1e4

    def later_gradients(inputs):
        x = inputs["x"].clone().requires_grad_()
        y, _ = causal_conv1d(**(inputs | {"x": x}), resets=resets, activation="silu")
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        return gradient[:, 4:]

    assert torch.equal(later_gradients(inputs), later_gradients(other))


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("K", [1, 4])
def test_pieces_with_a_carried_tail_equal_the_whole(backend, K):
    inputs = make_inputs(T=13, K=K)
    resets = make_resets(2, 13, 0, 6, 7)
    whole, last = causal_conv1d(**inputs, resets=resets, backend=backend)
    ys, tail = [], inputs.pop("tail")
    for start, end in ((0, 1), (1, 3), (3, 4), (4, 12), (12, 13)):
        part = inputs | {"x": inputs["x"][:, start:end]}
        y, tail = causal_conv1d(**part, resets=resets[:, start:end], tail=tail, backend=backend)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=0, atol=1e-12)
    assert torch.equal(tail, last)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("T", [1, 9])
def test_a_float32_tail_becomes_what_the_inputs_are(backend, T):
    inputs = make_inputs(T=T, dtype=torch.bfloat16)
    wide = inputs | {"tail": inputs["tail"].float()}
    for a, b in zip(
        causal_conv1d(**wide, backend=backend),
        causal_conv1d(**inputs, backend=backend),
        strict=True,
    ):
        assert a.dtype == b.dtype == torch.bfloat16
        assert torch.equal(a, b)


def test_float32_weights_are_not_rounded_to_bfloat16():
    inputs = make_inputs() | {"x": make_inputs()["x"].bfloat16(), "tail": None}
    y, _ = causal_conv1d(**inputs)
    inputs["x"] = inputs["x"].double()
    expected, _ = causal_conv1d(**inputs, backend="reference")
    assert torch.equal(y, expected.bfloat16())


def test_what_is_hidden_spoils_no_gradient():
    inputs = make_inputs(dtype=torch.float32)
    resets = make_resets(2, 9, 0)
    spoiled = inputs | {"tail": inputs["tail"] * torch.nan}
    options = {"resets": resets, "activation": "silu", "backend": "eager"}
    expected = outputs_and_gradients(run, inputs, **options)
    actual = outputs_and_gradients(run, spoiled, **options)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("activation", [None, "silu"])
def test_nothing_but_the_inputs_is_kept(activation):
    leaves = [x.requires_grad_() for x in make_inputs(dtype=torch.float32).values()]
    x, weight, bias, tail = leaves
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        causal_conv1d(x, weight, bias, tail=tail, activation=activation, backend="eager")
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in leaves}


def test_other_strides_no_graph_break_and_recomputation():
    """A slice of a wider projection, its result turned; compiled, recomputed and both."""
    inputs = make_inputs(C=6, dtype=torch.float32)
    resets = make_resets(2, 9, 4)

    def function(x, weight, bias, tail):
        part = slice(3)
        inputs = {"x": x[..., part], "weight": weight[part], "bias": bias[part]}
        y, after = causal_conv1d(
            **inputs, resets=resets, tail=tail[..., part], activation="silu", backend="eager"
        )
        return {"y": y.mT, "tail after": after.mT}

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = outputs_and_gradients(function, inputs)
    for form in (
        compiled,
        lambda **inputs: checkpoint(function, **inputs, use_reentrant=False),
        lambda **inputs: checkpoint(compiled, **inputs, use_reentrant=False),
    ):
        assert_close(outputs_and_gradients(form, inputs), expected, BOUNDS[torch.float32])


def test_keeping_the_tail_does_not_keep_the_sequence():
    inputs = make_inputs(T=100)
    _, tail = causal_conv1d(**inputs)
    assert tail.untyped_storage().nbytes() == tail.numel() * tail.element_size()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 12),
    C=st.integers(1, 4),
    K=st.integers(1, 6),
    bias=st.booleans(),
    tail=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
    reset_seed=st.none() | st.integers(0, 1000),
)
def test_any_shape(B, T, C, K, bias, tail, activation, reset_seed):
    resets = None
    if reset_seed is not None:
        resets = torch.rand(B, T, generator=torch.Generator().manual_seed(reset_seed)) < 0.3
    compare(run, make_inputs(B, T, C, K, bias, tail), BOUNDS, resets=resets, activation=activation)


BAD = {
    "x dims": ({"x": torch.zeros(2, 3)}, r"x: got shape \(2, 3\), expected \(B, T, C\)"),
    "no token": ({"x": torch.zeros(2, 0, 3)}, r"x: got .* with at least one token"),
    "x dtype": ({"x": torch.zeros(2, 9, 3).long()}, r"x: got torch.int64, expected a float"),
    "weight": ({"weight": torch.zeros(4, 3)}, r"weight: got shape \(4, 3\), expected \(3, K\)"),
    "no kernel": ({"weight": torch.zeros(3, 0)}, r"weight: got shape \(3, 0\), expected .*1"),
    "bias": ({"bias": torch.zeros(1)}, r"bias: got shape \(1,\), expected \(3,\)"),
    "resets": ({"resets": torch.zeros(2, 9)}, r"resets: got torch.float32 .*torch.bool \(2, 9\)"),
    "tail": ({"tail": torch.zeros(2, 4, 3)}, r"tail: got shape \(2, 4, 3\), expected \(2, 3, 3\)"),
    "activation": ({"activation": "gelu"}, r"activation: got 'gelu', expected 'silu' or None"),
    "backend": ({"backend": "cuda"}, r"backend: got 'cuda', expected one of 'auto'"),
    "gpu": ({"backend": "gpu"}, r"backend='gpu': needs tensors on a GPU, got cpu"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_argument(monkeypatch, change, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"^causal_conv1d: {message}"):
        causal_conv1d(**(make_inputs() | change))
