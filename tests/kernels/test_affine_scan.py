"""affine_scan: eager, forward and every gradient, against the float64 reference."""

import itertools

import pytest
import torch
from gla_cases import assert_close, cast
from hypothesis import given, settings
from hypothesis import strategies as st
from megarec_kernels.affine_scan import affine_scan
from op_cases import compare, make_resets, random_inputs

# Relative to the largest value of each tensor; in bfloat16 only what goes out is rounded.
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8}
KINDS = list(itertools.product((1, 2, 3, 5), ("diagonal", "block")))
kinds = pytest.mark.parametrize(("K", "kind"), KINDS, ids=[f"{kind} {K}" for K, kind in KINDS])


def make_inputs(B=2, T=13, K=2, D=3, kind="block", state=True, dtype=torch.float64, seed=0):
    shapes = {"A": (B, T, K, D) if kind == "diagonal" else (B, T, K, K, D), "b": (B, T, K, D)}
    shapes |= {"state": (B, K, D)} if state else {}
    inputs = random_inputs(shapes, seed=seed)
    inputs["A"] *= 0.8 / K**0.5  # products of many stay near 1
    return cast(inputs, dtype)


def run(**arguments):
    return {"h": affine_scan(**arguments)}


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_by_hand(backend):
    A, b = torch.tensor([2.0, 3.0, 5.0]).view(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    state = torch.full((1, 1, 1), 10.0)
    resets = torch.tensor([[False, True, False]])

    def scan(A, **options):
        return affine_scan(A, b, backend=backend, **options).flatten().tolist()

    for matrices in (A, A[..., None]):
        assert scan(matrices) == [1, 4, 21]
        assert scan(matrices, state=state) == [21, 64, 321]
        assert scan(matrices, state=state, reverse=True) == [309, 154, 51]
        assert scan(matrices, state=state, resets=resets) == [21, 1, 6]
        assert scan(matrices, state=state, resets=resets, reverse=True) == [3, 1, 51]


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_rows_are_of_the_new_slots(backend):
    A = torch.tensor([[0.0, 2.0], [0.0, 0.0]]).view(1, 1, 2, 2, 1)
    state = torch.tensor([3.0, 5.0]).view(1, 2, 1)
    h = affine_scan(A, torch.zeros(1, 1, 2, 1), state=state, backend=backend)
    assert h.flatten().tolist() == [10, 0]


@pytest.mark.parametrize("kind", ["diagonal", "block"])
def test_gradcheck_of_the_reference(kind):
    inputs = make_inputs(T=4, D=2, kind=kind)
    resets = make_resets(2, 4, 2)

    def function(*leaves):
        arguments = dict(zip(inputs, leaves, strict=True))
        return affine_scan(**arguments, resets=resets, backend="reference")

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()])


@kinds
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_eager_equals_the_reference(reverse, K, kind):
    # 1, squares, powers of 2, primes: blocks of all sizes, whole or not.
    for T in (1, 2, 3, 4, 5, 9, 16, 17, 31, 37, 40):
        for state in (False, True):
            compare(run, make_inputs(T=T, K=K, kind=kind, state=state), BOUNDS, reverse=reverse)


@kinds
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_resets_at_every_place(reverse, K, kind):
    inputs = make_inputs(B=3, K=K, kind=kind)
    for starts in ([0], *([t] for t in range(1, 13)), [0, 1], [3, 4], [0, 4, 8, 12], [11, 12]):
        compare(run, inputs, BOUNDS, resets=make_resets(3, 13, *starts), reverse=reverse)


@kinds
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_a_document_does_not_touch_the_next_one_bitwise(reverse, K, kind):
    inputs = make_inputs(K=K, kind=kind, dtype=torch.float32)
    for backend, start in itertools.product(("reference", "eager"), range(13)):
        resets = torch.zeros(2, 13, dtype=torch.bool)
        resets[:, start] = True
        after, before = (slice(None, start + 1), slice(start + 1, None))
        if not reverse:
            before, after = slice(None, start), slice(start, None)
        other = {name: x.clone() for name, x in inputs.items()}
        other["state"] *= -1e4
        for name in ("A", "b"):
            other[name][:, before] *= -3
        other["A"][:, start] *= -1e4

        results = []
        for values in (inputs, other):
            leaves = {name: x.clone().requires_grad_() for name, x in values.items()}
            h = affine_scan(**leaves, resets=resets, reverse=reverse, backend=backend)
            (db,) = torch.autograd.grad(h.square().sum(), leaves["b"])
            results.append((h[:, after].detach(), db[:, after]))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@kinds
def test_no_gradient_crosses_a_reset(K, kind):
    inputs = {name: x.requires_grad_() for name, x in make_inputs(K=K, kind=kind).items()}
    for start in range(13):
        resets = torch.zeros(2, 13, dtype=torch.bool)
        resets[:, start] = True
        h = affine_scan(**inputs, resets=resets)
        gradients = torch.autograd.grad(h[:, start:].sum(), list(inputs.values()))
        dA, db, dstate = gradients
        assert not dA[:, : start + 1].any() and not db[:, :start].any() and not dstate.any()
        assert db[:, start:].all()


@kinds
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_pieces_with_a_carried_state_equal_the_whole(backend, K, kind):
    inputs = make_inputs(K=K, kind=kind)
    resets = make_resets(2, 13, 0, 6)
    resets[1] = False
    results = []
    for cuts in ((0, 13), (0, 1, 3, 4, 12, 13)):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        hs, state = [], leaves["state"]
        for start, end in itertools.pairwise(cuts):
            part = (leaves["A"][:, start:end], leaves["b"][:, start:end])
            h = affine_scan(*part, state=state, resets=resets[:, start:end], backend=backend)
            state = h[:, -1]
            hs.append(h)
        h = torch.cat(hs, 1)
        gradients = torch.autograd.grad(h.square().sum(), list(leaves.values()))
        results.append({"h": h.detach(), **dict(zip("Abs", gradients, strict=True))})
    assert_close(*results, 1e-12)


def test_rows_do_not_depend_on_each_other_bitwise():
    inputs = make_inputs(B=3, dtype=torch.float32)
    h = affine_scan(**inputs)
    for row in range(3):
        alone = affine_scan(**{name: x[row : row + 1] for name, x in inputs.items()})
        assert torch.equal(alone[0], h[row])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 40),
    K=st.integers(1, 6),
    D=st.integers(1, 4),
    kind=st.sampled_from(["diagonal", "block"]),
    state=st.booleans(),
    reverse=st.booleans(),
    reset_seed=st.none() | st.integers(0, 1000),
)
def test_any_shape(B, T, K, D, kind, state, reverse, reset_seed):
    resets = None
    if reset_seed is not None:
        resets = torch.rand(B, T, generator=torch.Generator().manual_seed(reset_seed)) < 0.2
    compare(run, make_inputs(B, T, K, D, kind, state), BOUNDS, resets=resets, reverse=reverse)


BAD = {
    "b dims": ({"b": torch.zeros(2, 13, 2)}, r"b: got shape \(2, 13, 2\), expected \(B, T, K, D\)"),
    "no token": ({"b": torch.zeros(2, 0, 2, 3)}, r"b: got .* with at least one token"),
    "b dtype": ({"b": torch.zeros(2, 13, 2, 3).long()}, r"b: got torch.int64, expected a float"),
    "A": (
        {"A": torch.zeros(2, 13, 2, 1, 3)},
        r"A: got .*, expected \(2, 13, 2, 3\) or \(2, 13, 2, 2, 3\)",
    ),
    "A dtype": ({"A": torch.zeros(2, 13, 2, 3)}, r"A: got torch.float32, .* of b, torch.float64"),
    "state": ({"state": torch.zeros(2, 3)}, r"state: got shape \(2, 3\), expected \(2, 2, 3\)"),
    "resets": ({"resets": torch.zeros(2, 13)}, r"resets: got torch.float32 .*torch.bool \(2, 13\)"),
    "backend": ({"backend": "cuda"}, r"backend: got 'cuda', expected one of 'auto'"),
    "gpu": ({"backend": "gpu"}, r"backend='gpu' is not built yet"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_argument(change, message):
    with pytest.raises(ValueError, match=f"^affine_scan: {message}"):
        affine_scan(**(make_inputs() | change))
