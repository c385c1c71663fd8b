"""grouped_norm: every form, forward and gradients, against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megarec_kernels.causal_conv1d import causal_conv1d
from megarec_kernels.grouped_norm import gpu, grouped_norm
from megarec_kernels.swiglu import swiglu
from op_cases import DEVICE, compare, compare_gpu, on_device, random_inputs
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

# The kernels round each result once; sums over a group make float64's errors larger.
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
# The eager form rounds before it multiplies by the weight, and twice more in the backward.
EAGER_BOUNDS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 4 * 2**-8}

KINDS = {
    "RMSNorm": {},
    "centred": {"center": True, "num_groups": 3},
    "gated": {"gate": True, "num_groups": 2},
    "gated, centred, no weight": {"gate": True, "center": True, "weight": False},
    "output gate, centred": {"output_gate": True, "center": True, "num_groups": 3},
    "both gates": {"gate": True, "output_gate": True},
    "output gate, no weight": {"output_gate": True, "weight": False},
    "no weight": {"weight": False, "num_groups": 3},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def make_case(*shape, gate=False, output_gate=False, weight=True, center=False, num_groups=1):
    """Return the tensors, and the options."""
    shapes = {"x": shape}
    shapes |= {"weight": shape[-1:]} if weight else {}
    shapes |= {"gate": shape} if gate else {}
    shapes |= {"output_gate": shape} if output_gate else {}
    options = {"center": center, "group_dim": shape[-1] // num_groups, "eps": 1e-5}
    return random_inputs(shapes), options


def run(**arguments):
    return {"y": grouped_norm(**arguments)}


def test_formulas():
    inputs, options = make_case(2, 12, num_groups=3, center=True)
    x, weight = inputs.values()
    expected = F.group_norm(x, 3, weight, eps=1e-5)
    torch.testing.assert_close(grouped_norm(**inputs, **options, backend="reference"), expected)
    u = x * F.silu(weight)
    norms = torch.stack([F.rms_norm(row, (6,), eps=1e-5) for row in u.view(4, 6)]).view(2, 12)
    gated = grouped_norm(x, gate=weight.expand(2, 12), group_dim=6, eps=1e-5, backend="reference")
    torch.testing.assert_close(gated, norms)


@kinds
def test_gradcheck_of_the_reference(kind):
    inputs, options = make_case(2, 6, **kind)

    def function(*leaves):
        arguments = dict(zip(inputs, leaves, strict=True))
        return grouped_norm(**arguments, **options, backend="reference")

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()])


@kinds
@pytest.mark.parametrize("shape", [(1, 12), (2, 3, 30)], ids=str)
def test_equals_the_reference(kind, shape):
    inputs, options = make_case(*shape, **kind)
    compare(run, inputs, EAGER_BOUNDS, **options)
    compare_gpu(run, inputs, BOUNDS, **options)


@kinds
def test_programs_with_several_tiles(monkeypatch, kind):
    """Of several rows each, the last one of fewer: 11 rows, 2 a tile, 2 or 4 programs."""
    monkeypatch.setattr(gpu, "TILE", 16)
    monkeypatch.setattr(gpu, "PROGRAMS", 4)
    inputs, options = make_case(11, 18, **(kind | {"num_groups": 3}))
    compare_gpu(run, inputs, {torch.float64: 1e-13}, **options)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 5),
    num_groups=st.integers(1, 3),
    group_dim=st.integers(2, 20),
    gate=st.booleans(),
    output_gate=st.booleans(),
    center=st.booleans(),
    weight=st.booleans(),
)
def test_any_shape(rows, num_groups, group_dim, **kind):
    inputs, options = make_case(rows, num_groups * group_dim, num_groups=num_groups, **kind)
    compare_gpu(run, inputs, {torch.float64: 1e-11}, **options)


@pytest.mark.parametrize("backend", ["eager", "gpu"])
def test_extreme_values(backend):
    """What float16 cannot square has a norm; zeros have none, and no gradient is infinite."""
    x = torch.tensor([[6e4, -6e4], [1e-4, 0.0], [0.0, 0.0]], device=DEVICE, dtype=torch.float16)
    x.requires_grad_()
    y = grouped_norm(x, eps=1e-6, backend=backend)
    (dx,) = torch.autograd.grad(y[:, 0].sum(), x)
    assert y[0].tolist() == [1, -1] and y[2].tolist() == [0, 0]
    exact = 1e-4 / (1e-8 / 2 + 1e-6) ** 0.5
    assert abs(y[1, 0].item() - exact) < 2e-3 * exact
    assert dx.isfinite().all() and dx[2].tolist() == [1000, 0]


@pytest.mark.parametrize("backend", ["eager", "gpu"])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_extreme_gates(backend):
    """Gates far from 0 are shut or open, and nothing is infinite."""
    x = torch.ones(4, 2, device=DEVICE, requires_grad=True)
    gate = torch.full_like(x, 1e4, requires_grad=True)
    output_gate = torch.tensor([[-1e30], [-1e4], [1e4], [1e30]], device=DEVICE).repeat(1, 2)
    leaves = x, gate, output_gate.requires_grad_()
    y = grouped_norm(x, eps=1e-5, gate=gate, output_gate=output_gate, backend=backend)
    gradients = torch.autograd.grad(y.sum(), leaves)
    torch.testing.assert_close(y[:, 0].tolist(), [0.0, 0.0, 1.0, 1.0])
    assert all(g.isfinite().all() for g in gradients) and not gradients[2].any()


def test_float32_weights_and_x_of_narrow_gates():
    """As in a model whose memory is float32: the result is as wide as the widest that scales."""
    inputs, options = make_case(3, 10, gate=True, num_groups=2)
    inputs = on_device(inputs) | {"gate": inputs["gate"].bfloat16().to(DEVICE)}
    inputs["x"], inputs["weight"] = inputs["x"].float(), inputs["weight"].float()
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    results = []
    for backend in ("gpu", "eager"):
        y = grouped_norm(**leaves, **options, backend=backend)
        gradients = torch.autograd.grad(y.square().sum(), list(leaves.values()))
        assert y.dtype == torch.float32
        assert [g.dtype for g in gradients] == [x.dtype for x in leaves.values()]
        results.append([y, *gradients])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= 2**-7 * expected.norm()


@kinds
def test_eager_is_torchs_bitwise(kind):
    inputs, options = make_case(3, 4, 24, **kind)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = {name: x.to(dtype) for name, x in inputs.items()}
        wide = {name: x.float() for name, x in rounded.items()}
        u = wide["x"]
        if "gate" in wide:
            u = u * F.silu(wide["gate"])
        norm = F.layer_norm if options["center"] else F.rms_norm
        groups = u.unflatten(-1, (-1, options["group_dim"]))
        expected = norm(groups, groups.shape[-1:], eps=1e-5).flatten(-2).to(dtype)
        if "weight" in rounded:
            expected = expected * rounded["weight"]
        if "output_gate" in wide:
            expected = (expected * wide["output_gate"].sigmoid()).to(dtype)
        assert torch.equal(grouped_norm(**rounded, **options), expected)


@kinds
def test_little_is_kept(kind):
    """The inputs as they are, and one or two statistics a group, for both fast forms."""
    inputs, options = make_case(5, 24, **kind)
    leaves = {name: x.to(DEVICE).requires_grad_() for name, x in inputs.items()}
    for backend, statistics in (("eager", 1 + options["center"]), ("gpu", 0)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
            grouped_norm(**leaves, **options, backend=backend)
        new = [x for x in kept if x.data_ptr() not in {y.data_ptr() for y in leaves.values()}]
        assert sum(x.numel() for x in new) == statistics * 5 * 24 // options["group_dim"]


def test_other_strides_and_no_graph_break():
    """A slice of a wider projection, and a gradient that is turned."""
    wide = random_inputs({"x": (3, 4, 10)})["x"].to(DEVICE).requires_grad_()

    def function(wide, backend="gpu"):
        x, gate = wide.split(5, -1)
        return grouped_norm(x, eps=1e-5, gate=gate, backend=backend).mT

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = function(wide, backend="reference")
    (expected_grad,) = torch.autograd.grad(expected.sum(), wide)
    for form in (function, compiled):
        y = form(wide)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), wide)[0], expected_grad)


def test_recomputed_activations_change_no_bit():
    """With the other small kernels of a block; forced from outside, as a user does."""
    inputs, _ = make_case(2, 3, 8)
    x, weight = (leaf.to(DEVICE).requires_grad_() for leaf in inputs.values())
    kernel = random_inputs({"kernel": (8, 2)})["kernel"].to(DEVICE)

    def block(x, weight):
        y, _ = causal_conv1d(grouped_norm(x, weight, eps=1e-5), kernel, activation="silu")
        return swiglu(y, x)

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGAREC_KERNELS", "gpu")
        for y in (block(x, weight), checkpoint(block, x, weight, use_reentrant=False)):
            results.append([y, *torch.autograd.grad(y.square().sum(), (x, weight))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_ops_are_what_torch_expects():
    for kind in ({}, {"gate": True, "output_gate": True}):
        inputs, _ = make_case(2, 4, **kind)
        leaves = on_device(inputs)
        x, weight, *gates = (leaves.get(k) for k in ("x", "weight", "gate", "output_gate"))
        arguments = (x.requires_grad_(), weight.requires_grad_(), *gates, 4, False, 1e-5)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.megarec.grouped_norm, arguments, test_utils=tests)
        arguments = (x.detach(), weight.detach(), *arguments[2:], x.detach())
        torch.library.opcheck(
            torch.ops.megarec.grouped_norm_backward,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )


X = torch.zeros(2, 6)
BAD = {
    "x dims": ({"x": torch.zeros(())}, r"x: got shape \(\), expected \(\.\.\., D\)"),
    "no channel": ({"x": torch.zeros(2, 0)}, r"x: got shape .* at least one channel"),
    "x dtype": ({"x": X.long()}, r"x: got torch.int64, expected a float dtype"),
    "weight": ({"weight": torch.zeros(5)}, r"weight: got shape \(5,\), expected \(6,\)"),
    "eps": ({"eps": 0.0}, r"eps: got 0.0, expected a number > 0"),
    "group_dim": ({"group_dim": 4}, r"group_dim: got 4, expected a divisor of 6"),
    "gate": ({"gate": torch.zeros(6)}, r"gate: got .* \(6,\), expected a float dtype, \(2, 6\)"),
    "output gate": (
        {"output_gate": X.long()},
        r"output_gate: got torch.int64 \(2, 6\), expected a float dtype, \(2, 6\)",
    ),
    "backend": ({"backend": "cuda"}, r"backend: got 'cuda', expected one of 'auto'"),
    "gpu": ({"backend": "gpu"}, r"backend='gpu': needs tensors on a GPU, got cpu"),
    "wide": (
        {"x": torch.zeros(1, 16385), "backend": "gpu"},
        r"backend='gpu': the kernels take groups of up to 16384 channels, got 16385",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_argument(monkeypatch, change, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"^grouped_norm: {message}"):
        grouped_norm(**({"x": X, "eps": 1e-6} | change))
