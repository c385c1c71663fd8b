"""The Triton form of gated_linear_attention, against the float64 reference.

Without a GPU kernels run in Triton's interpreter, where a tile of a head takes 0.2 s: few of them.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch
from gla_cases import assert_close, assert_rms, cast, make_inputs, make_state, outputs_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from megarec_kernels.gated_linear_attention import gated_linear_attention
from megarec_kernels.gated_linear_attention.gpu import (
    _backward,
    _forward,
    gated_linear_attention_gpu,
)
from op_cases import DEVICE, poisoned_memory

pytest.importorskip("triton")

MODES = list(itertools.product(("exp", "plain"), (True, False)))
FEW_MODES = [MODES[0], MODES[3]]
few_modes = pytest.mark.parametrize(("gate", "normalize"), FEW_MODES, ids=str)

# Relative RMS errors. Results are rounded to the inputs' dtype, with errors of up to 2^-9
# (bfloat16) or 2^-12 of themselves; of that size, too, are those of y and its gradient, of the
# states and of products with gates, which add up at random in the rest.
BOUNDS = {torch.float32: 5e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
KINDS = [
    (dtype, *mode) for dtype in BOUNDS for mode in (MODES if dtype == torch.float32 else FEW_MODES)
]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def rounded(inputs, dtype):
    """Return inputs of a dtype, with gates in float32."""
    return {key: x.to(dtype if key in "qkv" else torch.float32) for key, x in inputs.items()}


def run(inputs, state=None, *, resets=None, **options):
    """Return the outputs and gradients of the kernels."""
    place = {"device": DEVICE}
    inputs = {key: x.to(**place) for key, x in inputs.items()}
    state = None if state is None else {key: x.to(**place) for key, x in state.items()}
    resets = None if resets is None else resets.to(**place)
    results = outputs_and_gradients(inputs, state, resets=resets, backend="gpu", **options)
    return {name: x.cpu() for name, x in results.items()}


def reference(inputs, state=None, **options):
    """Return those of the float64 reference for the same, rounded, inputs."""
    state = None if state is None else cast(state, torch.float64)
    inputs = cast(inputs, torch.float64)
    return outputs_and_gradients(inputs, state, backend="reference", **options)


def compare(inputs, state=None, *, bound, **options):
    """Compare forward and every gradient."""
    actual = run(inputs, state, **options)
    assert_rms(actual, reference(inputs, state, **options), bound)
    return actual


ONE = {"B": 1, "G": 1, "H": 1}
SHAPES = {
    "one token": ONE | {"T": 1},
    "shorter than a tile": ONE | {"T": 11, "B": 2, "Dk": 17, "Dv": 6},
    "more key dims": ONE | {"T": 33, "Dk": 40, "Dv": 16},
}


@pytest.mark.parametrize(("dtype", "gate", "normalize"), KINDS, ids=str)
def test_chunks_groups_and_a_carried_state(dtype, gate, normalize):
    """Three tiles in two chunks, the last ragged; dims that are no powers of 2."""
    heads = 2 if dtype == torch.float32 else 1
    inputs = rounded(make_inputs(B=1, T=133, G=1, H=heads, Dk=20, Dv=24), dtype)
    state = make_state(inputs, gate, normalize)
    options = {"gate": gate, "normalize": normalize, "chunk_size": 128}
    actual = compare(inputs, state, bound=BOUNDS[dtype], **options)
    assert actual["y"].dtype == actual["dq"].dtype == dtype
    assert actual["final.C"].dtype == actual["dlog_f"].dtype == torch.float32


@few_modes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, gate, normalize):
    inputs = rounded(make_inputs(**shape), torch.float32)
    compare(inputs, bound=BOUNDS[torch.float32], gate=gate, normalize=normalize)


def test_wide_heads():
    inputs = rounded(make_inputs(**ONE, T=20, Dk=512, Dv=40), torch.bfloat16)
    compare(inputs, bound=BOUNDS[torch.bfloat16], normalize=True)


# Tiles of 64 tokens, chunks of 128: the first and last token, both sides of the border of a tile
# and of a chunk, neighbours; a row without a reset.
RESETS = [[0, 63, 66, 67, 68, 129], [1, 64, 127, 128, 132], []]


@few_modes
def test_resets_at_every_place(gate, normalize):
    inputs = rounded(make_inputs(B=len(RESETS), T=133, G=1, H=1), torch.float32)
    resets = torch.zeros(len(RESETS), 133, dtype=torch.bool)
    for row, places in enumerate(RESETS):
        resets[row, list(places)] = True
    state = make_state(inputs, gate, normalize)
    options = {"gate": gate, "normalize": normalize, "chunk_size": 128, "resets": resets}
    actual = compare(inputs, state, bound=BOUNDS[torch.float32], **options)
    assert actual["log_decay"].isinf().all(1).tolist() == [True, True, False]


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, -1e4), (torch.bfloat16, 1e4)])
def test_documents_do_not_touch_each_other_bitwise(dtype, value):
    """Neither y and the final state of what follows, nor the gradients of what came before."""
    start, T = 37, 70
    inputs = rounded(make_inputs(**ONE, T=T), dtype)
    state = make_state(inputs, "exp", True)
    resets = torch.zeros(1, T, dtype=torch.bool)
    resets[:, start] = True
    other = {key: x.clone() for key, x in inputs.items()}
    for key in ("q", "k", "v"):
        other[key][:, :start] *= -3
    for key in ("log_f", "log_i"):
        other[key][:, :start] = value
    options = {"normalize": True, "chunk_size": 64, "resets": resets}
    a, b = run(inputs, **options), run(other, state, **options)
    for name, x in a.items():
        later = slice(None) if name.startswith("final") else (slice(None), slice(start, None))
        if name != "log_decay":
            assert torch.equal(x[later], b[name][later]), name
    assert not torch.equal(a["y"][:, :start], b["y"][:, :start])


# As in test_gated_linear_attention.py: gates of 1e4 overflow the sum itself, unless the stabiliser
# and the normaliser share the unit.
EXTREMES = [
    (*mode, log_f, log_i)
    for mode in MODES
    for log_f, log_i in ((-1e4, None), (-1e4, 1e4), (1e4, -1e4), (-25.0, None))
    if 1e4 not in (log_f, log_i) or mode == ("exp", True)
]


@pytest.mark.parametrize(("gate", "normalize", "log_f", "log_i"), EXTREMES)
def test_extreme_gates_give_nothing_non_finite(gate, normalize, log_f, log_i):
    inputs = rounded(make_inputs(**ONE, T=20), torch.float32)
    inputs["log_f"][:, [3, 12, 13]] = log_f
    if log_i is not None:
        inputs["log_i"][:, [2, 9, 16]] = log_i
    options = {"gate": gate, "normalize": normalize}
    actual = run(inputs, **options)
    assert all(x.isfinite().all() for x in actual.values())
    if log_f == -25.0:  # float32 knows a sum of gates near 1e4 to 1e-3 only
        assert_close(actual, reference(inputs, **options), 5e-5)


def test_no_input_gate_and_a_scale():
    inputs = rounded(make_inputs(**ONE, T=20), torch.float32)
    del inputs["log_i"]
    compare(inputs, bound=BOUNDS[torch.float32], normalize=True, scale=-0.7)


def test_tensors_of_any_strides():
    """q, k and v side by side, as one projection gives them, are read in place."""
    rng = torch.Generator().manual_seed(0)
    fused = torch.randn(1, 20, 3, 12, generator=rng).to(DEVICE).requires_grad_()
    turned = torch.randn(1, 3, 4, 4, generator=rng).to(DEVICE).requires_grad_()
    gate = torch.full((1, 20, 3), -0.1, device=DEVICE)
    resets = (torch.arange(20, device=DEVICE) == 15).expand(1, 20)

    def gradients(q, k, v, C, inputs):
        state = {"C": C, "m": torch.zeros(1, 3, device=DEVICE)}
        y, _, _ = gated_linear_attention(q, k, v, gate, state=state, resets=resets, backend="gpu")
        return y, torch.autograd.grad(y.sum(), inputs)  # a gradient of stride 0

    slices = fused.split(4, -1)
    assert slices[1].stride() == fused.stride()
    dense = [x.detach().contiguous().requires_grad_() for x in (*slices, turned.mT)]
    y, (dfused, dturned) = gradients(*slices, turned.mT, [fused, turned])
    expected, (*dslices, dC) = gradients(*dense, dense)
    assert torch.equal(y, expected)
    assert torch.equal(dfused, torch.cat(dslices, -1))
    assert torch.equal(dturned, dC.mT)


def test_heads_farther_apart_than_32_bits_count():
    """Heads 2^30 elements apart, as of (B, H, T, D) in memory; only what is used is allocated."""
    T, H, D = 5, 3, 4

    def spread(x):
        far = torch.empty((H - 1) * 2**30 + T * D, dtype=x.dtype, device=DEVICE)
        far = far.as_strided(x.shape, (0, D, 2**30, 1))
        far.copy_(x)
        return far.requires_grad_()

    inputs = rounded(make_inputs(B=1, T=T, G=H, H=H, Dk=D, Dv=D), torch.bfloat16)
    dense = {key: x.to(DEVICE).requires_grad_() for key, x in inputs.items()}
    torch.use_deterministic_algorithms(False)  # else torch.empty fills the memory
    far = dense | {key: spread(inputs[key]) for key in "qkv"}

    def y_and_gradients(leaves):
        y, _, _ = gated_linear_attention(**leaves, normalize=True, backend="gpu")
        return y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))

    for a, b in zip(y_and_gradients(far), y_and_gradients(dense), strict=True):
        assert torch.equal(a, b)


def test_only_states_in_memory_are_rounded():
    """In float32, states in bfloat16 cost no more than their rounding, and are not carried on."""
    inputs = rounded(make_inputs(**ONE, T=133), torch.float32)
    del inputs["log_i"]
    options = {"resets": None, "state": None, "scale": 0.5, "gate": "plain", "normalize": False}
    arguments = [x.to(DEVICE) for x in inputs.values()]

    def final_and_error(**more):
        y, state = gated_linear_attention_gpu(*arguments, None, **options, chunk_size=64, **more)
        expected, _, _ = gated_linear_attention(
            *cast(inputs, torch.float64).values(), scale=0.5, gate="plain", backend="reference"
        )
        return state["C"], ((y.cpu() - expected).norm() / expected.norm()).item()

    exact, small = final_and_error()
    final, error = final_and_error(states_dtype=torch.bfloat16)
    assert small < 1e-6 < 2**-12 < error < 2**-8
    assert torch.equal(final, exact)


def arguments_of_the_op(resets=None):
    inputs = rounded(make_inputs(**ONE, T=9), torch.float32)
    state = make_state(inputs, "exp", True)
    leaves = [*inputs.values(), state["C"], state["n"]]
    leaves = [x.to(DEVICE).requires_grad_() for x in leaves]
    return [*leaves, state["m"].to(DEVICE), resets, 0.3, True, False, 8, torch.float32]


def test_the_ops_are_registered_as_torch_wants_them():
    resets = torch.zeros(1, 9, dtype=torch.bool, device=DEVICE)
    arguments = arguments_of_the_op(resets)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_forward, arguments, test_utils=checks)
    q, k, v, log_f, log_i, C, n, _, _, *options = arguments
    y, final, final_n, m, sums = _forward(*arguments)
    saved = [x.detach() for x in (y, final, final_n, q, k, v, log_f, log_i, C, n)]
    rest = [resets, y.detach(), m.detach(), sums.detach()]
    torch.library.opcheck(_backward, [*saved, *rest, *options], test_utils=checks)


def test_under_torch_compile_and_checkpointing():
    inputs = rounded(make_inputs(**ONE, T=9), torch.float32)
    resets = torch.zeros(1, 9, dtype=torch.bool, device=DEVICE)
    resets[:, 4] = True

    def function(*tensors):
        y, state, _ = gated_linear_attention(*tensors, normalize=True, resets=resets, backend="gpu")
        return y.square().sum() + state["C"].sum()

    leaves = [x.to(DEVICE).requires_grad_() for x in inputs.values()]
    expected = torch.autograd.grad(function(*leaves), leaves)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for loss in (
        compiled(*leaves),
        torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False),
    ):
        for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
            assert torch.equal(a, b)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 20),
    shape=st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    Dk=st.integers(1, 40),
    Dv=st.integers(1, 40),
    chunk_size=st.integers(1, 50),
    mode=st.sampled_from(MODES),
    carried=st.booleans(),
    reset_seed=st.none() | st.integers(0, 1000),
)
def test_any_shape(T, shape, Dk, Dv, chunk_size, mode, carried, reset_seed):
    G, ratio = shape
    gate, normalize = mode
    inputs = rounded(make_inputs(B=1, T=T, G=G, H=G * ratio, Dk=Dk, Dv=Dv), torch.float32)
    state = make_state(inputs, gate, normalize) if carried else None
    resets = None
    if reset_seed is not None:
        resets = torch.rand(1, T, generator=torch.Generator().manual_seed(reset_seed)) < 0.2
    options = {"gate": gate, "normalize": normalize, "chunk_size": chunk_size, "resets": resets}
    compare(inputs, state, bound=BOUNDS[torch.float32], **options)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_on_the_cpu_only_the_interpreter_runs_kernels(monkeypatch):
    inputs = rounded(make_inputs(**ONE, T=3), torch.float32)
    calls = []
    with monkeypatch.context() as patch:
        patch.setitem(
            gated_linear_attention.__globals__["FORMS"], "gpu", lambda *a, **b: calls.append(a)
        )
        gated_linear_attention(**inputs)
    assert not calls  # "auto" is eager
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = r"backend='gpu': needs tensors on a GPU, got cpu \(or TRITON_INTERPRET=1"
    with pytest.raises(ValueError, match=f"^gated_linear_attention: {message}"):
        gated_linear_attention(**inputs, backend="gpu")
    monkeypatch.setenv("MEGAREC_KERNELS", "gpu")
    with pytest.raises(ValueError, match="MEGAREC_KERNELS='gpu': needs tensors on a GPU, got cpu"):
        gated_linear_attention(**inputs)
    monkeypatch.setattr("megarec_kernels.dispatch.HAS_TRITON", False)
    with pytest.raises(ValueError, match="MEGAREC_KERNELS='gpu': needs Triton: pip install triton"):
        gated_linear_attention(**inputs)
