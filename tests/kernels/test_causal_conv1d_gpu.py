"""causal_conv1d's kernels: forward, tail and every gradient against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megarec_kernels.causal_conv1d import causal_conv1d, gpu
from op_cases import DEVICE, compare_gpu, make_resets, on_device, random_inputs

pytest.importorskip("triton")

# All is computed in promote_types(dtype, float32), and each result rounded once.
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
EXACT = {torch.float64: BOUNDS[torch.float64]}


def make_inputs(B=2, T=9, C=3, K=4, bias=True, tail=True):
    shapes = {"x": (B, T, C), "weight": (C, K)}
    shapes |= {"bias": (C,)} if bias else {}
    shapes |= {"tail": (B, K - 1, C)} if tail else {}
    return random_inputs(shapes)


def run(**arguments):
    y, tail = causal_conv1d(**arguments)
    return {"y": y, "tail after": tail}


@pytest.mark.parametrize("activation", [None, "silu"])
def test_every_dtype(activation):
    resets = make_resets(1, 4, 3)
    compare_gpu(run, make_inputs(B=1, T=4, C=50), BOUNDS, resets=resets, activation=activation)


@pytest.mark.parametrize(
    "shape",
    [
        {"T": 1},
        {"T": 3, "tail": False},
        {"B": 1, "C": 1, "T": 5, "bias": False, "tail": False},
        {"K": 1, "T": 5},
        {"B": 1, "K": 8, "T": 2, "bias": False},
        {"C": 130, "T": 2},
    ],
    ids=str,
)
def test_shapes(shape):
    compare_gpu(run, make_inputs(**shape), EXACT, activation="silu")


@pytest.mark.parametrize(("segment", "K"), [(1, 4), (3, 4), (3, 2)])
def test_programs_that_share_a_row(monkeypatch, segment, K):
    """Their halo is K - 1 tokens on either side; a reset, and the row's ends, may be in it."""
    monkeypatch.setattr(gpu, "SEGMENT", segment)
    resets = make_resets(2, 5, 3)
    compare_gpu(run, make_inputs(T=5, K=K), EXACT, resets=resets, activation="silu")


@pytest.mark.parametrize("starts", [[0], [3], [6], [2, 4], [0, 1, 2, 3]], ids=str)
def test_resets_at_every_place(monkeypatch, starts):
    monkeypatch.setattr(gpu, "SEGMENT", 4)
    compare_gpu(run, make_inputs(B=1, T=7), EXACT, resets=make_resets(1, 7, *starts))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 5),
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
    inputs = make_inputs(B, T, C, K, bias, tail)
    compare_gpu(run, inputs, EXACT, resets=resets, activation=activation)


def test_a_document_does_not_touch_the_next_one_bitwise():
    """Not even by values that would spoil all they touch, neither results nor gradients."""
    inputs = on_device(make_inputs())
    resets = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    resets[:, 4] = True
    spoiled = {name: value.clone() for name, value in inputs.items()}
    spoiled["x"][:, :4] = torch.nan
    spoiled["tail"][:] = torch.nan
    results = []
    for case in (inputs, spoiled):
        x = case["x"].requires_grad_()
        y, tail = causal_conv1d(**case, resets=resets, activation="silu", backend="gpu")
        (dx,) = torch.autograd.grad(y[:, 4:].sum() + tail.sum(), x)
        results.append([y[:, 4:], tail, dx[:, 4:]])
    for clean, other in zip(*results, strict=True):
        assert clean.isfinite().all() and torch.equal(clean, other)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_values_stay_finite():
    inputs = make_inputs(T=3) | {"weight": torch.full((3, 4), 1e4)}
    inputs["x"] *= 1e4
    compare_gpu(run, inputs, {torch.float32: 1e-6}, activation="silu")


def test_inputs_with_other_strides():
    """A slice of a wider projection, and a gradient that is expanded."""
    wide = on_device(random_inputs({"x": (2, 5, 9)}))["x"].requires_grad_()
    weight = on_device(random_inputs({"weight": (4, 3)}))["weight"].mT
    gradients = []
    for backend in ("gpu", "reference"):
        y, tail = causal_conv1d(wide[..., 2:5], weight, backend=backend)
        gradients.append(torch.autograd.grad(y.sum() + tail.sum(), wide)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def test_only_y_may_be_needed():
    inputs = {name: x.requires_grad_() for name, x in on_device(make_inputs(T=3)).items()}
    gradients = []
    for backend in ("gpu", "reference"):
        y, _ = causal_conv1d(**inputs, backend=backend)
        gradients.append(torch.autograd.grad(y.square().sum(), list(inputs.values())))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_the_ops_are_what_torch_expects():
    inputs = on_device(make_inputs(T=2, C=2, K=2))
    resets = torch.tensor([[False, True], [False, False]], device=DEVICE)
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    torch.library.opcheck(
        torch.ops.megarec.causal_conv1d,
        (*leaves, resets, inputs["tail"], True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    leaves = [leaf.detach().bfloat16() for leaf in leaves]
    arguments = (*leaves, None, None, False, leaves[0], inputs["tail"].bfloat16())
    torch.library.opcheck(
        torch.ops.megarec.causal_conv1d_backward,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_without_a_graph_break():
    inputs = on_device(make_inputs(T=2, C=2, K=2))
    x = inputs.pop("x").requires_grad_()

    def function(x):
        return causal_conv1d(x, **inputs, activation="silu", backend="gpu")[0] * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(
        *[(y := f(x), torch.autograd.grad(y.sum(), x)[0]) for f in (compiled, function)],
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_a_kernel_that_does_not_fit():
    inputs = on_device(make_inputs(K=9))
    with pytest.raises(ValueError, match="backend='gpu': the kernels take K up to 8, got 9"):
        causal_conv1d(**inputs, backend="gpu")
    y, _ = causal_conv1d(**inputs)
    assert y.shape == (2, 9, 3)
