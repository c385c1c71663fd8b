"""linear_cross_entropy: loss and gradients against the float64 reference."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megarec_kernels.linear_cross_entropy import linear_cross_entropy
from torch.utils.flop_counter import FlopCounterMode

OPTIONS = [
    {"soft_cap": soft_cap, "z_loss": z_loss}
    for soft_cap, z_loss in itertools.product((None, 2.0), (0.0, 1e-2))
]


def make_inputs(N=11, D=4, V=7, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=rng, dtype=torch.float64)
    weight = torch.randn(V, D, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, V, (N,), generator=rng)
    labels[::3] = -100
    return x.to(dtype), weight.to(dtype), labels


def loss_and_gradients(x, weight, labels, **options):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(x, weight, labels, **options)
    return [loss.detach(), *torch.autograd.grad(loss * 0.3, (x, weight))]


def test_equals_torch():
    x, weight, labels = make_inputs()
    expected = F.cross_entropy(x @ weight.T, labels, reduction="sum")
    for backend in ("reference", "eager"):
        torch.testing.assert_close(
            linear_cross_entropy(x, weight, labels, backend=backend), expected
        )


def test_soft_cap_and_z_loss_from_their_formulas():
    x, weight, labels = make_inputs()
    z = 2.0 * torch.tanh(x @ weight.T / 2.0)
    kept = labels != -100
    expected = F.cross_entropy(z, labels, reduction="sum")
    expected = expected + 0.1 * z.exp().sum(-1).log()[kept].square().sum()
    for backend in ("reference", "eager"):
        loss = linear_cross_entropy(x, weight, labels, soft_cap=2.0, z_loss=0.1, backend=backend)
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_of_the_reference(options):
    x, weight, labels = make_inputs()

    def function(x, weight):
        return linear_cross_entropy(x, weight, labels, backend="reference", **options)

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100])
@pytest.mark.parametrize("options", OPTIONS)
def test_eager_equals_the_reference(options, chunk_size):
    x, weight, labels = make_inputs()
    expected = loss_and_gradients(x, weight, labels, backend="reference", **options)
    actual = loss_and_gradients(x, weight, labels, chunk_size=chunk_size, **options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    single = loss_and_gradients(x.float(), weight.float(), labels, chunk_size=chunk_size, **options)
    for a, b in zip(single, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 9),
    D=st.integers(1, 5),
    V=st.integers(1, 9),
    chunk_size=st.integers(1, 12),
    options=st.sampled_from(OPTIONS),
)
def test_any_shape(N, D, V, chunk_size, options):
    x, weight, labels = make_inputs(N, D, V)
    expected = loss_and_gradients(x, weight, labels, backend="reference", **options)
    actual = loss_and_gradients(x, weight, labels, chunk_size=chunk_size, **options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def make_weights(N=11, dtype=torch.float64):
    """Return weights of tokens; one is 0, and some are negative."""
    weights = torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[4] = 0
    return weights.to(dtype)


def weighted_loss_and_gradients(x, weight, labels, weights, **options):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, weights)]
    loss = linear_cross_entropy(*leaves[:2], labels, token_weights=leaves[2], **options)
    return [loss.detach(), *torch.autograd.grad(loss * 0.3, leaves)]


def test_token_weights_from_their_formula():
    x, weight, labels = make_inputs()
    weights = make_weights()
    z = 2.0 * torch.tanh(x @ weight.T / 2.0)
    losses = F.cross_entropy(z, labels, reduction="none")
    losses = losses + 0.1 * z.logsumexp(-1).square() * (labels != -100)
    for backend in ("reference", "eager"):
        loss, _, _, dweights = weighted_loss_and_gradients(
            x, weight, labels, weights, soft_cap=2.0, z_loss=0.1, backend=backend
        )
        torch.testing.assert_close(loss, weights @ losses)
        # The gradient of a weight is the loss of its token, that of an ignored one 0.
        torch.testing.assert_close(dweights, 0.3 * losses)
        assert torch.equal(dweights[labels == -100], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_of_the_reference_with_token_weights(options):
    x, weight, labels = make_inputs()

    def function(x, weight, weights):
        return linear_cross_entropy(
            x, weight, labels, token_weights=weights, backend="reference", **options
        )

    leaves = [tensor.requires_grad_() for tensor in (x, weight, make_weights())]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100])
@pytest.mark.parametrize("options", OPTIONS)
def test_eager_equals_the_reference_with_token_weights(options, chunk_size):
    x, weight, labels = make_inputs()
    weights = make_weights()
    inputs = (x, weight, labels, weights)
    expected = weighted_loss_and_gradients(*inputs, backend="reference", **options)
    actual = weighted_loss_and_gradients(*inputs, chunk_size=chunk_size, **options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    single = (x.float(), weight.float(), labels, weights.float())
    for a, b in zip(
        weighted_loss_and_gradients(*single, chunk_size=chunk_size, **options),
        expected,
        strict=True,
    ):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_weights_of_one_change_no_bit():
    x, weight, labels = make_inputs()
    plain = loss_and_gradients(x, weight, labels, chunk_size=4)
    ones = weighted_loss_and_gradients(x, weight, labels, torch.ones(11).double(), chunk_size=4)
    assert all(torch.equal(a, b) for a, b in zip(plain, ones[:3], strict=True))


def test_token_weights_of_batches_and_of_another_dtype():
    """Wide weights of narrow activations, as of a gate that is computed in float32."""
    x, weight, labels = make_inputs(N=12, dtype=torch.bfloat16)
    weights = make_weights(12, torch.float32)
    flat = weighted_loss_and_gradients(x, weight, labels, weights, chunk_size=5)
    assert [a.dtype for a in flat] == [torch.float32, *[torch.bfloat16] * 2, torch.float32]
    batched = weighted_loss_and_gradients(
        x.view(3, 4, -1), weight, labels.view(3, 4), weights.view(3, 4), chunk_size=5
    )
    assert batched[3].shape == (3, 4)
    for a, b in zip(flat, batched, strict=True):
        assert torch.equal(a.flatten(), b.flatten())
    expected = weighted_loss_and_gradients(
        x.double(), weight.double(), labels, weights.double(), backend="reference"
    )
    # The logits are bf16's.
    torch.testing.assert_close(flat[0].double(), expected[0], rtol=2**-7, atol=0)
    torch.testing.assert_close(flat[3].double(), expected[3], rtol=2**-6, atol=2**-7)


def test_batches_are_rows():
    x, weight, labels = make_inputs(N=12)
    flat = loss_and_gradients(x, weight, labels)
    batched = loss_and_gradients(x.view(3, 4, -1), weight, labels.view(3, 4))
    assert torch.equal(flat[0], batched[0])
    assert torch.equal(flat[1], batched[1].flatten(0, 1))
    assert torch.equal(flat[2], batched[2])


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_nothing_to_predict_is_zero(backend):
    x, weight, labels = make_inputs()
    labels.fill_(-1)
    for result in loss_and_gradients(
        x, weight, labels, ignore_index=-1, z_loss=0.1, backend=backend
    ):
        assert torch.equal(result, torch.zeros_like(result))


def test_huge_logits_stay_finite():
    x, weight, labels = make_inputs(dtype=torch.float32)
    for soft_cap in (None, 30.0):
        results = loss_and_gradients(x * 1e4, weight, labels, soft_cap=soft_cap)
        assert all(result.isfinite().all() for result in results)


def test_only_what_needs_a_gradient_gets_one():
    x, weight, labels = make_inputs()
    expected = loss_and_gradients(x, weight, labels)
    for index in (0, 1):
        leaves = [x.clone(), weight.clone()]
        leaf = leaves[index].requires_grad_()
        loss = linear_cross_entropy(*leaves, labels)
        (gradient,) = torch.autograd.grad(loss * 0.3, leaf)
        assert torch.equal(gradient, expected[1 + index])


def test_token_weights_alone_may_need_a_gradient():
    x, weight, labels = make_inputs()
    weights = make_weights()
    expected = weighted_loss_and_gradients(x, weight, labels, weights)[3]
    leaf = weights.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(x, weight, labels, token_weights=leaf)
        (gradient,) = torch.autograd.grad(loss * 0.3, leaf)
    assert torch.equal(gradient, expected)
    # The logits, and nothing of what x and weight would need.
    assert counter.get_total_flops() == 2 * 11 * 4 * 7
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, labels, token_weights=weights)
    assert loss.requires_grad and torch.autograd.grad(loss, x)[0].shape == x.shape


def test_no_gradient_is_computed_that_nobody_asked_for():
    x, weight, labels = make_inputs(N=11, D=4, V=7)
    matmul = 2 * 11 * 4 * 7

    def flops():
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(x, weight, labels, chunk_size=4)
        return counter.get_total_flops()

    assert flops() == matmul
    weight.requires_grad_()
    assert flops() == 2 * matmul
    x.requires_grad_()
    assert flops() == 3 * matmul
    with torch.no_grad():
        assert flops() == matmul


def test_backward_twice_gives_the_same():
    x, weight, labels = make_inputs()
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, labels)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def test_bf16_inputs():
    """Logits are bf16 (2^-8 relative), what follows is float32, gradients are bf16 again."""
    x, weight, labels = make_inputs(N=64, V=32, dtype=torch.bfloat16)
    loss, dx, dweight = loss_and_gradients(x, weight, labels, chunk_size=8)
    expected = loss_and_gradients(x.double(), weight.double(), labels, backend="reference")
    assert (loss.dtype, dx.dtype, dweight.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(loss.double(), expected[0], rtol=2**-8, atol=0)
    for actual, want in zip((dx, dweight), expected[1:], strict=True):
        assert (actual.double() - want).abs().max() < 2**-5 * want.abs().max()


BAD = {
    "x dims": ({"x": torch.zeros(4)}, r"x: got shape \(4,\), expected \(N, D\) or \(B, T, D\)"),
    "x dtype": ({"x": torch.zeros(11, 4).long()}, r"x: got torch.int64, expected a float dtype"),
    "weight": ({"weight": torch.zeros(7, 5)}, r"weight: got shape \(7, 5\), expected \(V, 4\)"),
    "weight dtype": ({"weight": torch.zeros(7, 4)}, r"weight: got torch.float32.*torch.float64"),
    "labels": ({"labels": torch.zeros(11)}, r"labels: got torch.float32 \(11,\), expected torch"),
    "labels shape": ({"labels": torch.zeros(10).long()}, r"labels: got .*\(10,\).*\(11,\)"),
    "token_weights": (
        {"token_weights": torch.zeros(10)},
        r"token_weights: got torch.float32 \(10,\), expected a float dtype, \(11,\)",
    ),
    "token_weights dtype": (
        {"token_weights": torch.zeros(11).long()},
        r"token_weights: got torch.int64 \(11,\), expected a float dtype",
    ),
    "soft_cap": ({"soft_cap": 0.0}, r"soft_cap: got 0.0, expected a number > 0"),
    "chunk_size": ({"chunk_size": 0}, r"chunk_size: got 0, expected at least 1"),
    "backend": ({"backend": "gpu"}, r"backend='gpu': needs tensors on a GPU, got cpu"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_argument(monkeypatch, change, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight, labels = make_inputs()
    arguments = {"x": x, "weight": weight, "labels": labels} | change
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {message}"):
        linear_cross_entropy(**arguments)
