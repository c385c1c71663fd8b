"""swiglu: every form, forward and gradients, against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megarec_kernels.swiglu import swiglu
from op_cases import DEVICE, compare, compare_gpu, random_inputs
from torch.nn import functional as F

pytest.importorskip("triton")

# The kernels round each result once.
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
# The eager form also rounds silu(gate), and a product on the way to the gate's gradient.
EAGER_BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 3 * 2**-8}


def make_inputs(*shape):
    return random_inputs({"gate": shape, "up": shape})


def run(**arguments):
    return {"y": swiglu(**arguments)}


def test_gradcheck_of_the_reference():
    leaves = [x.requires_grad_() for x in make_inputs(2, 3).values()]
    assert torch.autograd.gradcheck(lambda *x: swiglu(*x, backend="reference"), leaves)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 48), ()], ids=str)
def test_equals_the_reference(shape):
    compare(run, make_inputs(*shape), EAGER_BOUNDS)
    compare_gpu(run, make_inputs(*shape), BOUNDS)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(size=st.integers(0, 5000))
def test_any_size(size):
    compare_gpu(run, make_inputs(size), {torch.float32: 1e-6})


@pytest.mark.parametrize("backend", ["eager", "gpu"])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_extreme_values(backend):
    """Far from 0 silu is 0 or its argument, and has slope 0 or 1."""
    gate = torch.tensor([-1e30, -1e4, 0.0, 1e4, 1e30], device=DEVICE, requires_grad=True)
    up = torch.full_like(gate, 2.0, requires_grad=True)
    y = swiglu(gate, up, backend=backend)
    dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    assert y.tolist() == [0, 0, 0, 2e4, torch.tensor(2e30).item()]
    assert dgate.tolist() == [0, 0, 1, 2, 2]
    assert torch.equal(dup, F.relu(gate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_is_torchs_bitwise(dtype):
    gate, up = (x.to(dtype).requires_grad_() for x in make_inputs(7, 33).values())
    results = []
    for y in (swiglu(gate, up), F.silu(gate) * up):
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (gate, up))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["eager", "gpu"])
def test_nothing_but_the_inputs_is_kept(backend):
    gate, up = (x.to(DEVICE).requires_grad_() for x in make_inputs(5).values())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        swiglu(gate, up, backend=backend)
    assert {x.data_ptr() for x in kept} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("backend", ["eager", "gpu"])
def test_other_strides_and_no_graph_break(backend):
    wide = make_inputs(3, 4)["gate"].to(DEVICE).requires_grad_()

    def function(wide):
        return swiglu(wide[:, :2], wide[:, 2:], backend=backend).mT

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = swiglu(wide[:, :2], wide[:, 2:], backend="reference").mT
    (expected_grad,) = torch.autograd.grad(expected.sum(), wide)
    for form in (function, compiled):
        y = form(wide)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), wide)[0], expected_grad)


def test_the_ops_are_what_torch_expects():
    gate, up = (x.to(DEVICE).requires_grad_() for x in make_inputs(2, 3).values())
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.megarec.swiglu, (gate, up), test_utils=tests)
    arguments = [x.detach() for x in (gate, up, gate)]
    torch.library.opcheck(
        torch.ops.megarec.swiglu_backward, arguments, test_utils=("test_schema", "test_faketensor")
    )


BAD = {
    "gate": ({"gate": torch.zeros(3).long()}, "gate: got torch.int64, expected a float dtype"),
    "shape": ({"up": torch.zeros(2)}, r"up: got torch.float32 \(2,\), expected .* \(3,\)"),
    "dtype": ({"up": torch.zeros(3).double()}, r"up: got torch.float64 .* torch.float32"),
    "backend": ({"backend": "cuda"}, r"backend: got 'cuda', expected one of 'auto'"),
    "gpu": ({"backend": "gpu"}, r"backend='gpu': needs tensors on a GPU, got cpu"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_argument(monkeypatch, change, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"^swiglu: {message}"):
        swiglu(**({"gate": torch.zeros(3), "up": torch.zeros(3)} | change))
