"""rotary: every form, forward and gradients, against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megarec_kernels.rotary import rotary
from op_cases import DEVICE, compare, compare_gpu, random_inputs

pytest.importorskip("triton")

# Each result is rounded once.
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
BACKENDS = ["eager", "gpu"]


def make_angles(*shape, seed=3):
    """Return angles (..., T, 1, R) in float64."""
    return 9 * random_inputs({"angle": (*shape[:-1], 1, shape[-1])}, seed=seed)["angle"]


def rotation_of(angle, dtype):
    turns = torch.stack([angle.cos(), angle.sin()])
    return turns.to(torch.promote_types(dtype, torch.float32))


def run(x, angle, **arguments):
    return {"y": rotary(x, rotation_of(angle, x.dtype), **arguments)}


def compare_both(shape, angle, bounds=BOUNDS, **options):
    inputs = random_inputs({"x": shape})
    compare(run, inputs, bounds, angle=angle, **options)
    compare_gpu(run, inputs, bounds, angle=angle, **options)


def plain(x, rotation, interleaved):
    """Turn by the formula, for autograd."""
    cos, sin = rotation
    half = cos.shape[-1]
    turning, rest = x.split([2 * half, x.shape[-1] - 2 * half], -1)
    pairs = turning.unflatten(-1, (half, 2) if interleaved else (2, half))
    first, second = pairs.unbind(-1 if interleaved else -2)
    turned = [first * cos - second * sin, second * cos + first * sin]
    together = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([together.to(x.dtype), rest], -1)


def test_gradcheck_of_the_reference():
    x = random_inputs({"x": (1, 2, 2, 5)})["x"].requires_grad_()
    rotation = rotation_of(make_angles(2, 2), x.dtype)
    assert torch.autograd.gradcheck(lambda x: rotary(x, rotation, backend="reference"), x)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "angles"),
    [
        ((2, 5, 3, 8), (5, 4)),  # whole heads, angles of all rows
        ((2, 5, 3, 8), (1, 5, 2)),  # half of a head
        ((2, 5, 3, 13), (2, 5, 3)),  # odd heads, each row has its own positions
        ((3, 1, 2, 6), (3, 1, 3)),  # a token, as in decoding
        ((1, 1, 1, 2), (1, 1)),
    ],
    ids=str,
)
def test_equals_the_reference(shape, angles, interleaved):
    compare_both(shape, make_angles(*angles), interleaved=interleaved)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data):
    B, T, H = (data.draw(st.integers(0, most)) for most in (2, 9, 3))
    R, rest = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 9))
    rows = data.draw(st.sampled_from([(), (1,), (B,)]))
    angle, interleaved = make_angles(*rows, T, R), data.draw(st.booleans())
    compare_both((B, T, H, 2 * R + rest), angle, {torch.float32: 1e-6}, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_eager_is_the_formula_bitwise(dtype, interleaved):
    """Also its gradients; in bfloat16 autograd rounds each product, and ours only the sum."""
    x = random_inputs({"x": (2, 5, 3, 11)}, dtype)["x"].requires_grad_()
    rotation = rotation_of(make_angles(2, 5, 4), dtype)
    y, expected = rotary(x, rotation, interleaved=interleaved), plain(x, rotation, interleaved)
    assert torch.equal(y, expected)
    dy = random_inputs({"dy": y.shape}, dtype, seed=1)["dy"]
    (dx,), (dx_plain,) = (torch.autograd.grad(z, x, dy) for z in (y, expected))
    if dtype != torch.bfloat16:
        assert torch.equal(dx, dx_plain)
    torch.testing.assert_close(dx, dx_plain, rtol=0, atol=3 * 2**-9 * dy.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_extreme_values(backend, interleaved):
    """What does not turn is passed through bit by bit; other heads do not see a NaN."""
    x = torch.ones(1, 2, 2, 6, device=DEVICE)
    x[0, 0, 0] = torch.nan
    x[..., 4:] = torch.tensor([-0.0, torch.inf])
    x[0, 0, 1, :4] = 1e38
    angle = torch.zeros(2, 1, 2, device=DEVICE)
    y = rotary(x, rotation_of(angle, x.dtype), interleaved=interleaved, backend=backend)
    assert torch.equal(y.view(torch.int32)[..., 4:], x.view(torch.int32)[..., 4:])
    assert y[0, 0, 0, :4].isnan().all()
    assert torch.equal(y[0, 0, 1], x[0, 0, 1]) and torch.equal(y[0, 1], x[0, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_but_the_angles_is_kept(backend):
    x = torch.randn(1, 2, 1, 4, device=DEVICE).requires_grad_()
    rotation = rotation_of(make_angles(2, 2).to(DEVICE), x.dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        rotary(x, rotation, backend=backend)
    assert [tensor.data_ptr() for tensor in kept] == [rotation.data_ptr()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_other_strides_and_no_graph_break(backend, interleaved):
    """Slices of a fused projection, heads first, dimensions first; an expanded gradient."""
    wide = random_inputs({"x": (2, 3, 18)})["x"].to(DEVICE).requires_grad_()
    rotation = rotation_of(make_angles(3, 2).to(DEVICE), wide.dtype)

    def function(wide, backend=backend):
        q = wide[..., 3:13].unflatten(-1, (2, 5))
        k = wide[..., :10].unflatten(-1, (5, 2)).mT
        v = wide[..., 8:].reshape(2, 3, 2, 5).transpose(1, 2).contiguous().transpose(1, 2)
        options = {"interleaved": interleaved, "backend": backend}
        turned = [rotary(x, rotation, **options) for x in (q, k, v)]
        return torch.cat(turned).mT

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = function(wide, backend="reference")
    (expected_grad,) = torch.autograd.grad(expected.sum(), wide)
    for form in (function, compiled):
        y = form(wide)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
        (grad,) = torch.autograd.grad(y.sum(), wide)
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-13)


@pytest.mark.parametrize("back", [False, True])
def test_the_op_is_what_torch_expects(back):
    x = random_inputs({"x": (2, 3, 2, 5)})["x"].to(DEVICE).requires_grad_()
    rotation = rotation_of(make_angles(3, 2).to(DEVICE), x.dtype)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.megarec.rotary, (x, rotation, True, back), test_utils=tests)


X, ROTATION = torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 2)
BAD = {
    "x": ({"x_BTHK": X[0]}, r"x_BTHK: got shape \(3, 1, 4\), expected \(B, T, H, K\)"),
    "x dtype": ({"x_BTHK": X.long()}, "x_BTHK: got torch.int64, expected a float dtype"),
    "dtype": ({"rotation": ROTATION.bfloat16()}, "rotation: got torch.bfloat16, .* torch.float32"),
    "tokens": ({"rotation": ROTATION[:, :2]}, r"rotation: got shape \(2, 2, 1, 2\), .*\(2, 3, 1,"),
    "rows": (
        {"rotation": ROTATION[:, None].expand(2, 3, 3, 1, 2)},
        r"rotation: got shape \(2, 3, 3, 1, 2\), expected .* or \(2, 2, 3, 1, R\)",
    ),
    "scalar": ({"rotation": torch.zeros(())}, r"rotation: got shape \(\), expected \(2, 3, 1, R"),
    "pairs": ({"rotation": torch.zeros(2, 3, 1, 3)}, "rotation: got 3 pairs, expected 1 to 2, as"),
    "no pairs": ({"rotation": ROTATION[..., :0]}, "rotation: got 0 pairs, expected 1 to 2, as"),
    "gradient": (
        {"rotation": ROTATION.clone().requires_grad_()},
        r"rotation: got one that requires a gradient, expected none, .* detach\(\)",
    ),
    "backend": ({"backend": "cuda"}, r"backend: got 'cuda', expected one of 'auto'"),
    "gpu": ({"backend": "gpu"}, r"backend='gpu': needs tensors on a GPU, got cpu"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_argument(monkeypatch, change, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"^rotary: {message}"):
        rotary(**({"x_BTHK": X, "rotation": ROTATION} | change))
