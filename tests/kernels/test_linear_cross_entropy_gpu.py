"""linear_cross_entropy with its kernel: loss and gradients against the float64 reference."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megarec_kernels.linear_cross_entropy import VocabularyPart, gpu, linear_cross_entropy
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


def run(sizes=None, **arguments):
    """Return the loss; the kernels divide the vocabulary into parts of these sizes, if any."""
    if sizes is None or arguments["backend"] == "reference":
        return {"loss": linear_cross_entropy(**arguments)}
    weights, token_weights = arguments.pop("weight").split(sizes), arguments.get("token_weights")
    # Each rank has their whole gradient, which is not added up.
    detached = {} if token_weights is None else {"token_weights": token_weights.detach()}

    def rank_loss(rank, add, largest):
        part = {"weight": weights[rank]} | (detached if rank > 0 else {})
        vocabulary = VocabularyPart(sum(sizes[:rank]), add, largest)
        return linear_cross_entropy(**arguments | part, vocabulary=vocabulary)

    first, *others = run_ranks_here(rank_loss, len(sizes))
    assert all(torch.equal(loss, first) for loss in others)
    # The value is that of each, the gradient what they give together.
    return {"loss": first + sum(loss - loss.detach() for loss in others)}


def run_ranks_here(function, ranks):
    """Return function(rank, add, largest) of each rank; the callables are as in VocabularyPart.

    Ranks are threads, and one runs at a time: Triton's interpreter is not for several at once.
    """
    turn, barrier = threading.Lock(), threading.Barrier(ranks, timeout=60)
    sent = [None] * ranks

    def wait():
        turn.release()
        try:
            barrier.wait()
        finally:
            turn.acquire()

    def run_rank(rank):
        def meet(combine, x):
            sent[rank] = x.clone()
            wait()
            combine(torch.stack(sent), 0, out=x)
            wait()
            return x

        with turn:
            try:
                return function(rank, lambda x: meet(torch.sum, x), lambda x: meet(torch.amax, x))
            except BaseException:
                barrier.abort()
                raise

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(run_rank, range(ranks)))


@pytest.mark.parametrize("sizes", [None, (3, 1, 5)], ids=["whole", "parts"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_dtype(monkeypatch, options, sizes):
    """A row is several blocks of the kernel, the last one not whole.

    The second part has no label.
    """
    monkeypatch.setattr(gpu, "BLOCK_V", 4)
    inputs, labels = make_case(weighted=options["z_loss"] > 0)
    assert 3 not in labels
    for dtype, bound in BOUNDS.items():
        results = []
        for backend, cast in (("gpu", dtype), ("reference", torch.float64)):
            leaves = [x.to(DEVICE, dtype).to(cast).requires_grad_() for x in inputs.values()]
            named = dict(zip(inputs, leaves, strict=True))
            shared = {"labels": labels.to(DEVICE), "sizes": sizes, "chunk_size": 3}
            loss = run(**named, **shared, backend=backend, **options)["loss"]
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


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    chunk_size=st.integers(1, 5),
    weighted=st.booleans(),
    ignored=st.sampled_from([0.0, 0.5]),
    options=st.sampled_from(OPTIONS),
)
def test_any_parts(N, sizes, chunk_size, weighted, ignored, options):
    inputs, labels = make_case(N, V=sum(sizes), weighted=weighted, ignored=ignored)
    shared = {"labels": labels, "chunk_size": chunk_size, "sizes": sizes}
    compare_gpu(run, inputs, {torch.float64: 1e-11}, **shared, **options)


@pytest.mark.parametrize("sizes", [None, (4, 5)], ids=["whole", "parts"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
def test_nothing_to_predict_is_zero(sizes):
    """Even where the logits are not finite."""
    inputs, _ = make_case()
    inputs = on_device(inputs)
    inputs["x"][0] = torch.inf
    leaves = [x.requires_grad_() for x in inputs.values()]
    labels = torch.full((7,), -1, device=DEVICE)
    options = {"ignore_index": -1, "z_loss": 0.1, "backend": "gpu", "chunk_size": 3}
    loss = run(sizes, **inputs, labels=labels, **options)["loss"]
    assert loss.item() == 0
    dx, _, dweights = torch.autograd.grad(loss, leaves)
    assert not dx.any() and not dweights.any()


@pytest.mark.parametrize("sizes", [None, (4, 5)], ids=["whole", "parts"])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_huge_logits(sizes):
    inputs, labels = make_case()
    inputs["x"] *= 1e4
    compare_gpu(run, inputs, {torch.float64: 1e-12}, labels=labels, z_loss=0.1, sizes=sizes)
    # With a cap most slopes are 0 up to rounding, and not worth a comparison.
    leaves = {name: x.requires_grad_() for name, x in on_device(inputs).items()}
    shared = {"labels": labels.to(DEVICE), "soft_cap": 30.0, "sizes": sizes}
    losses = [run(**leaves, **shared, backend=form)["loss"] for form in ("gpu", "reference")]
    torch.testing.assert_close(*losses, rtol=1e-13, atol=0)
    gradients = torch.autograd.grad(losses[0], list(leaves.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_label_that_is_not_there_makes_the_loss_nan():
    inputs, labels = make_case()
    for wrong in (9, -1):
        labels[2] = wrong
        loss = linear_cross_entropy(**on_device(inputs), labels=labels.to(DEVICE), backend="gpu")
        assert loss.isnan()


@pytest.mark.parametrize("sizes", [None, (4, 5)], ids=["whole", "parts"])
def test_only_what_needs_a_gradient_gets_one(sizes):
    inputs, labels = make_case()
    whole = {name: x.requires_grad_() for name, x in on_device(inputs).items()}
    shared = {"labels": labels.to(DEVICE), "backend": "gpu", "sizes": sizes}
    loss = run(**whole, **shared)["loss"]
    expected = dict(zip(whole, torch.autograd.grad(loss, list(whole.values())), strict=True))
    for name in whole:
        leaves = {key: x.detach().requires_grad_(key == name) for key, x in whole.items()}
        loss = run(**leaves, **shared)["loss"]
        (gradient,) = torch.autograd.grad(loss, leaves[name])
        assert torch.equal(gradient, expected[name])
    leaves = {key: x.detach() for key, x in whole.items()}
    assert torch.equal(run(**leaves, **shared)["loss"], loss)


def test_no_gradient_where_none_is_wanted():
    inputs, labels = make_case()
    leaves = {name: x.requires_grad_() for name, x in on_device(inputs).items()}
    vocabulary = VocabularyPart(0, lambda x: x, lambda x: x)
    with torch.no_grad():
        for part in (None, vocabulary):
            loss = linear_cross_entropy(
                **leaves, labels=labels.to(DEVICE), vocabulary=part, backend="gpu"
            )
            assert not loss.requires_grad


@pytest.mark.parametrize("backend", ["eager", "gpu"])
def test_ranks_meet_twice_a_chunk(backend):
    inputs, labels = make_case()
    calls = []

    def meet(name, x):
        assert not torch.is_grad_enabled()
        calls.append((name, x.numel()))
        return x

    part = VocabularyPart(0, lambda x: meet("add", x), lambda x: meet("largest", x))
    linear_cross_entropy(
        **on_device(inputs),
        labels=labels.to(DEVICE),
        chunk_size=3,
        vocabulary=part,
        backend=backend,
    )
    assert calls == [(name, n * k) for k in (3, 3, 1) for name, n in (("largest", 1), ("add", 2))]


def test_the_ops_are_what_torch_expects_and_have_no_graph_break():
    inputs, labels = make_case(N=3, weighted=False)
    x, weight, labels = inputs["x"].to(DEVICE), inputs["weight"].to(DEVICE), labels.to(DEVICE)
    logits, lse = x @ weight.T, torch.zeros(3, dtype=x.dtype, device=DEVICE)
    for op, arguments in (
        ("rows", (labels, None, -100, 2.0, 0.1, True)),
        ("statistics", (labels, 4, 2.0)),
        ("part", (labels, None, lse, lse, 4, -100, 2.0, 0.1, True)),
    ):
        torch.library.opcheck(
            getattr(torch.ops.megarec, f"cross_entropy_{op}"),
            (logits, *arguments),
            test_utils=("test_schema", "test_faketensor"),
        )

    def function(x):
        return linear_cross_entropy(x, weight, labels, chunk_size=2, backend="gpu")

    x.requires_grad_()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(function(x), x)
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], expected)
