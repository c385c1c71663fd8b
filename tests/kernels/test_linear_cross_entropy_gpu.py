"""linear_cross_entropy with its kernel: loss and gradients against the float64 reference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megarec_kernels.linear_cross_entropy import gpu, linear_cross_entropy
from op_cases import DEVICE, compare_gpu, on_device, random_inputs

pytest.importorskip("triton")

# Logits are rounded to the dtype, then their gradients; logits of size 4 by up to 2^-7 in bf16.
BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
OPTIONS = [
    {"soft_cap": soft_cap, "z_loss": z_loss}
    for soft_cap, z_loss in itertools.product((None, 2.0), (0.0, 1e-2))
]


def make_case(N=7, D=4, V=9, weighted=True, ignored=0.4, seed=0):
    """Return the tensors, and labels of which a part is ignored."""
    shapes = {"x": (N, D), "weight": (V, D)} | ({"token_weights": (N,)} if weighted else {})
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (N,), generator=rng)
    labels[torch.rand(N, generator=rng) < ignored] = -100
    return random_inputs(shapes, seed=seed), labels


def run(**arguments):
    return {"loss": linear_cross_entropy(**arguments)}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_dtype(monkeypatch, options):
    """A row is several blocks of the kernel, the last one not whole."""
    monkeypatch.setattr(gpu, "BLOCK_V", 4)
    inputs, labels = make_case(weighted=options["z_loss"] > 0)
    for dtype, bound in BOUNDS.items():
        results = []
        for backend, cast in (("gpu", dtype), ("reference", torch.float64)):
            leaves = [x.to(DEVICE, dtype).to(cast).requires_grad_() for x in inputs.values()]
            named = dict(zip(inputs, leaves, strict=True))
            loss = linear_cross_entropy(
                **named, labels=labels.to(DEVICE), chunk_size=3, backend=backend, **options
            )
            assert loss.dtype == torch.promote_types(cast, torch.float32)
            gradients = torch.autograd.grad(loss * 0.3, leaves)
            assert {g.dtype for g in gradients} == {cast}
            results.append([loss, *gradients])
        for actual, expected in zip(*results, strict=True):
            assert (actual - expected).norm() <= bound * expected.norm()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 6),
    D=st.integers(1, 5),
    V=st.integers(1, 9),
    chunk_size=st.integers(1, 7),
    weighted=st.booleans(),
    ignored=st.sampled_from([0.0, 0.5]),
    options=st.sampled_from(OPTIONS),
)
def test_any_shape(N, D, V, chunk_size, weighted, ignored, options):
    inputs, labels = make_case(N, D, V, weighted, ignored)
    compare_gpu(
        run, inputs, {torch.float64: 1e-11}, labels=labels, chunk_size=chunk_size, **options
    )


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
def test_nothing_to_predict_is_zero():
    """Even where the logits are not finite."""
    inputs, _ = make_case()
    inputs = on_device(inputs)
    inputs["x"][0] = torch.inf
    leaves = [x.requires_grad_() for x in inputs.values()]
    labels = torch.full((7,), -1, device=DEVICE)
    loss = linear_cross_entropy(
        **inputs, labels=labels, ignore_index=-1, z_loss=0.1, backend="gpu", chunk_size=3
    )
    assert loss.item() == 0
    dx, _, dweights = torch.autograd.grad(loss, leaves)
    assert not dx.any() and not dweights.any()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_huge_logits():
    inputs, labels = make_case()
    inputs["x"] *= 1e4
    compare_gpu(run, inputs, {torch.float64: 1e-12}, labels=labels, z_loss=0.1)
    # With a cap most slopes are 0 up to rounding, and not worth a comparison.
    leaves = {name: x.requires_grad_() for name, x in on_device(inputs).items()}
    losses = [
        linear_cross_entropy(**leaves, labels=labels.to(DEVICE), soft_cap=30.0, backend=backend)
        for backend in ("gpu", "reference")
    ]
    torch.testing.assert_close(*losses, rtol=1e-13, atol=0)
    gradients = torch.autograd.grad(losses[0], list(leaves.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_label_that_is_not_there_makes_the_loss_nan():
    inputs, labels = make_case()
    for wrong in (9, -1):
        labels[2] = wrong
        loss = linear_cross_entropy(**on_device(inputs), labels=labels.to(DEVICE), backend="gpu")
        assert loss.isnan()


def test_only_what_needs_a_gradient_gets_one():
    inputs, labels = make_case()
    whole = {name: x.requires_grad_() for name, x in on_device(inputs).items()}
    labels = labels.to(DEVICE)
    loss = linear_cross_entropy(**whole, labels=labels, backend="gpu")
    expected = dict(zip(whole, torch.autograd.grad(loss, list(whole.values())), strict=True))
    for name in whole:
        leaves = {key: x.detach().requires_grad_(key == name) for key, x in whole.items()}
        loss = linear_cross_entropy(**leaves, labels=labels, backend="gpu")
        (gradient,) = torch.autograd.grad(loss, leaves[name])
        assert torch.equal(gradient, expected[name])
    with torch.no_grad():
        assert not linear_cross_entropy(**whole, labels=labels, backend="gpu").requires_grad


def test_the_op_is_what_torch_expects_and_has_no_graph_break():
    inputs, labels = make_case(N=3, weighted=False)
    x, weight, labels = inputs["x"].to(DEVICE), inputs["weight"].to(DEVICE), labels.to(DEVICE)
    torch.library.opcheck(
        torch.ops.megarec.cross_entropy_rows,
        (x @ weight.T, labels, None, -100, 2.0, 0.1, True),
        test_utils=("test_schema", "test_faketensor"),
    )

    def function(x):
        return linear_cross_entropy(x, weight, labels, chunk_size=2, backend="gpu")

    x.requires_grad_()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(function(x), x)
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], expected)
