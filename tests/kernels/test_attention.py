"""attention: every form, forward and gradients, against the float64 reference."""

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from gla_cases import assert_close, cast
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megarec_kernels.attention import attention
from megarec_kernels.attention.gpu import flex, flex_fits
from op_cases import (
    compare,
    make_resets,
    outputs_and_gradients,
    random_inputs,
    start_gradients,
)

# float32 and bfloat16: sums of rounded products, of a softmax computed in float32.
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7}


def make_inputs(B=2, T=7, S=None, H=4, G=2, Dk=3, Dv=5, dtype=torch.float64, seed=0):
    S = S or T
    shapes = {"q": (B, T, H, Dk), "k": (B, S, G, Dk), "v": (B, S, G, Dv)}
    return random_inputs(shapes, dtype, seed)


def dense_weights(q, k, resets=None, num_cached=None, window=None, scale=None):
    """Softmax over all keys with a mask filled in pair by pair, from the docstring of the op."""
    B, T, H, Dk = q.shape
    S = k.shape[1]
    cached = S - T
    mask = torch.zeros(B, T, S, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            for s in range(cached + t + 1):
                between = range(max(0, s - cached + 1), t + 1)  # new tokens after s, up to t
                mask[b, t, s] = window is None or cached + t - s < window
                mask[b, t, s] &= resets is None or not resets[b, between].any()
                if s < cached and num_cached is not None:
                    mask[b, t, s] &= s >= cached - num_cached[b]
    k = k.repeat_interleave(H // k.shape[2], 2)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (Dk**-0.5 if scale is None else scale)
    return scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)


def dense(q, k, v, **options):
    """Attention by those weights."""
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    return torch.einsum("bhts,bshv->bthv", dense_weights(q, k, **options), v)


def rounded_sums(q, k, v, scale=None, **options):
    """Sums of the sizes of all terms of y, dq, dk and dv: what rounding a term is relative to.

    Torch's kernel rounds weights, the scores' gradients and y, from which these also come.
    """
    G = k.shape[2]
    groups = q.shape[2] // G
    weights_BHTS = dense_weights(q, k, scale=scale, **options)
    g = start_gradients({"y": dense(q, k, v, scale=scale, **options)})[0].abs()
    size_q, size_k, size_v = q.abs(), *(x.abs().repeat_interleave(groups, 2) for x in (k, v))
    terms_BHTS = torch.einsum("bthv,bshv->bhts", g, size_v)
    terms_BHTS = terms_BHTS + (weights_BHTS * terms_BHTS).sum(-1, keepdim=True)
    scores_BHTS = weights_BHTS * terms_BHTS * (q.shape[-1] ** -0.5 if scale is None else scale)
    dk = torch.einsum("bhts,bthk->bshk", scores_BHTS, size_q)
    dv = torch.einsum("bhts,bthv->bshv", weights_BHTS, g)
    return {
        "y": torch.einsum("bhts,bshv->bthv", weights_BHTS, size_v),
        "dq": torch.einsum("bhts,bshk->bthk", scores_BHTS, size_k),
        "dk": dk.unflatten(2, (G, groups)).sum(3),
        "dv": dv.unflatten(2, (G, groups)).sum(3),
    }


def run(function=attention, **arguments):
    return {"y": function(**arguments)}


CASES = {
    "plain": {},
    "odd length": {"T": 13},
    "one token": {"T": 1},
    "one head": {"H": 1, "G": 1},
    "no groups": {"H": 4, "G": 4},
    "one head of keys": {"H": 4, "G": 1},
    "one row, wide values": {"B": 1, "Dk": 1, "Dv": 9},
    "a cache": {"T": 4, "S": 9},
    "a cache before one token": {"T": 1, "S": 6},
}


@pytest.mark.parametrize("window", [None, 1, 3, 100], ids=lambda w: f"window {w}")
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
def test_eager_equals_the_reference(shape, window):
    compare(run, make_inputs(**shape), BOUNDS, window=window)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, {}),
        ({"scale": -0.7}, {"H": 6, "G": 3}),
        ({"window": 3}, {"T": 6, "S": 11}),
        ({"resets": make_resets(2, 7, 0, 3, 4)}, {"S": 10}),
        ({"resets": make_resets(2, 7, 5), "window": 2, "num_cached": torch.tensor([1, 3])},
         {"S": 10}),
        ({"num_cached": torch.tensor([0, 2])}, {"T": 1, "S": 4}),
    ],
    ids=["plain", "scale and groups", "cached window", "resets", "all", "step"],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_equals_softmax_with_a_mask(backend, options, shape):
    inputs = make_inputs(**shape)
    expected = outputs_and_gradients(run, inputs, function=dense, **options)
    assert_close(outputs_and_gradients(run, inputs, backend=backend, **options), expected, 1e-12)


@pytest.mark.parametrize("S", [7, 10], ids=["no cache", "cache"])
@pytest.mark.parametrize("window", [None, 3], ids=["all", "window"])
@pytest.mark.parametrize("starts", [[0], [1], [3], [6], [0, 1], [2, 3], [2, 3, 4], [5, 6]], ids=str)
def test_resets_at_every_place(starts, window, S):
    compare(run, make_inputs(B=3, S=S), BOUNDS, resets=make_resets(3, 7, *starts), window=window)


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("window", [None, 1, 3], ids=lambda w: f"window {w}")
def test_only_some_cached_keys_count(window, T):
    inputs = make_inputs(B=5, T=T, S=T + 5)
    num_cached = torch.tensor([0, 1, 3, 5, 9])
    compare(run, inputs, BOUNDS, num_cached=num_cached, window=window)
    other = cast(inputs, torch.float64)
    for row, count in enumerate(num_cached.tolist()):
        for name in "kv":
            other[name] = other[name].clone()
            other[name][row, : max(0, 5 - count)] *= -3
    for backend in ("reference", "eager"):
        options = {"num_cached": num_cached, "window": window, "backend": backend}
        assert torch.equal(attention(**inputs, **options), attention(**other, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_document_does_not_touch_the_next_one_bitwise(backend, dtype):
    inputs = make_inputs(T=40, S=50, Dk=16, Dv=16, dtype=dtype)
    for start in (0, 1, 17, 39):
        resets = torch.zeros(2, 40, dtype=torch.bool)
        resets[:, start] = True
        other = {name: x.clone() for name, x in inputs.items()}
        other["q"][:, :start] *= -3
        for name in "kv":
            other[name][:, : 10 + start] *= -1e4
        y = attention(**inputs, resets=resets, backend=backend)
        y2 = attention(**other, resets=resets, backend=backend)
        assert torch.equal(y[:, start:], y2[:, start:])


def test_gradients_stay_in_their_document_bitwise():
    inputs = make_inputs(T=20, dtype=torch.float32)
    resets = torch.zeros(2, 20, dtype=torch.bool)
    resets[:, 11] = True
    other = {name: x.clone() for name, x in inputs.items()}
    for name in "qkv":
        other[name][:, :11] *= -100
    first, second = (outputs_and_gradients(run, x, resets=resets) for x in (inputs, other))
    for name in first:
        assert torch.equal(first[name][:, 11:], second[name][:, 11:])


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_no_token_sees_the_future_bitwise(backend):
    inputs = make_inputs(T=20, S=23, dtype=torch.float32)
    other = {name: x.clone() for name, x in inputs.items()}
    for name, first in (("q", 13), ("k", 16), ("v", 16)):
        other[name][:, first:] *= -100
    for window in (None, 4):
        options = {"window": window, "backend": backend}
        y, y2 = attention(**inputs, **options), attention(**other, **options)
        assert torch.equal(y[:, :13], y2[:, :13])
        assert not torch.equal(y[:, 13:], y2[:, 13:])


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("window", [None, 1, 4], ids=lambda w: f"window {w}")
def test_pieces_over_a_cache_equal_the_whole(window, backend):
    inputs = make_inputs(T=13)
    options = {"window": window, "backend": backend}
    whole = attention(**inputs, **options)
    for start, end in ((0, 1), (1, 5), (5, 6), (6, 13)):
        kept = 0 if window is None else max(0, start - (window - 1))
        part = attention(
            inputs["q"][:, start:end], inputs["k"][:, kept:end], inputs["v"][:, kept:end], **options
        )
        torch.testing.assert_close(part, whole[:, start:end], rtol=0, atol=1e-12)


def test_gradcheck_of_the_reference():
    inputs = make_inputs(T=3, S=4, H=2, G=1, Dk=2, Dv=2)
    options = {"resets": make_resets(2, 3, 2), "window": 2, "num_cached": torch.tensor([1, 0])}

    def function(*leaves):
        return attention(*leaves, **options, backend="reference")

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize("resets", [None, make_resets(2, 7, 3)], ids=["causal", "masked"])
def test_huge_scores_stay_finite(resets):
    inputs = make_inputs(dtype=torch.float32)
    inputs["q"] *= 1e4
    actual = outputs_and_gradients(run, inputs, resets=resets)
    exact = cast(inputs, torch.float64)
    expected = outputs_and_gradients(run, exact, backend="reference", resets=resets)
    assert_close({"y": actual["y"]}, {"y": expected["y"]}, 1e-5)
    assert all(x.isfinite().all() for x in actual.values())


def test_the_softmax_of_bfloat16_is_computed_in_float32():
    """Weights rounded to bfloat16 would lose this sum of 4,096 equal ones."""
    inputs = make_inputs(B=1, T=1, S=4096, H=1, G=1, Dk=16, Dv=16, dtype=torch.bfloat16)
    inputs["k"].zero_()
    for options in ({}, {"window": 4000}):
        y = attention(**inputs, **options)
        expected = inputs["v"][:, -options.get("window", 4096) :].double().mean(1)
        torch.testing.assert_close(y[:, 0].double(), expected, rtol=2**-8, atol=1e-4)


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """Return torch's flex_attention as it runs without torch.compile, gradients included.

    On a CPU torch refuses to differentiate it, by a check alone: the dense form works anywhere.
    """
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    # Not even the tracing that torch does otherwise, anew for every shape.
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    return torch_flex.flex_attention


FLEX_CASES = {
    "plain": ({}, {}),
    "resets": ({"B": 3}, {"resets": make_resets(3, 7, 0, 3, 4)}),
    "window": ({}, {"window": 3}),
    "window 1, no groups": ({"H": 2}, {"window": 1}),
    "a cache": ({"S": 11, "H": 4, "G": 1}, {"resets": make_resets(2, 7, 2)}),
    "all": (
        {"S": 11, "B": 3},
        {"resets": make_resets(3, 7, 2), "num_cached": torch.tensor([1, 3, 9]), "window": 5},
    ),
    "one token": ({"T": 1, "S": 5}, {"num_cached": torch.tensor([0, 2])}),
    "several blocks": ({"T": 140, "S": 150}, {"resets": make_resets(2, 140, 130), "window": 20}),
}


@pytest.mark.parametrize(("shape", "options"), FLEX_CASES.values(), ids=FLEX_CASES.keys())
def test_flex_equals_the_reference(uncompiled_flex, shape, options):
    inputs = make_inputs(**shape)

    def function(q, k, v, resets=None, num_cached=None, window=None):
        return flex(uncompiled_flex, q, k, v, resets, num_cached, window, 0.4)

    for dtype in (torch.float64, torch.float32):
        actual = outputs_and_gradients(run, cast(inputs, dtype), function=function, **options)
        exact = cast(cast(inputs, dtype), torch.float64)
        expected = outputs_and_gradients(run, exact, backend="reference", scale=0.4, **options)
        assert_close(actual, expected, BOUNDS[dtype])


def test_which_heads_have_a_fast_flex_kernel():
    for Dk, Dv, fits in ((64, 64, True), (16, 256, True), (8, 64, False), (64, 96, False)):
        inputs = make_inputs(Dk=Dk, Dv=Dv)
        assert flex_fits(inputs["q"], inputs["v"]) == fits


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    cached=st.integers(0, 5),
    G=st.integers(1, 2),
    ratio=st.integers(1, 3),
    Dk=st.integers(1, 4),
    Dv=st.integers(1, 4),
    window=st.none() | st.integers(1, 16),
    scale=st.none() | st.just(0.3),
    seeds=st.tuples(st.none() | st.integers(0, 1000), st.none() | st.integers(0, 1000)),
)
@example(1, 6, 1, 2, 1, 3, 3, None, None, (0, None))  # dk cancels in bfloat16
def test_any_shape(B, T, cached, G, ratio, Dk, Dv, window, scale, seeds):
    resets = num_cached = None
    if seeds[0] is not None:
        resets = torch.rand(B, T, generator=torch.Generator().manual_seed(seeds[0])) < 0.3
    if seeds[1] is not None:
        rng = torch.Generator().manual_seed(seeds[1])
        num_cached = torch.randint(0, 8, (B,), generator=rng)
    inputs = make_inputs(B, T, T + cached, G * ratio, G, Dk, Dv)
    options = {"resets": resets, "num_cached": num_cached, "window": window, "scale": scale}
    bounds = {dtype: BOUNDS[dtype] for dtype in (torch.float64, torch.float32)}
    compare(run, inputs, bounds, **options)
    # In bfloat16 a sum may cancel and its terms' rounding stay: four roundings of each at most,
    # entry by entry. (The bound relative to the result is for the cases above.)
    rounded = cast(inputs, torch.bfloat16)
    exact = cast(rounded, torch.float64)
    actual = outputs_and_gradients(run, rounded, backend="eager", **options)
    expected = outputs_and_gradients(run, exact, backend="reference", **options)
    sums = rounded_sums(**exact, **options)
    for name, want in expected.items():
        error = (actual[name].double() - want).abs()
        assert (error <= 4 * 2**-9 * sums[name] + 1e-12).all(), (name, error.max())


BAD = {
    "q dims": ({"q": torch.zeros(2, 7, 3)}, r"q: got shape .*expected \(B, T, H, Dk\)"),
    "no token": ({"q": torch.zeros(2, 0, 4, 3)}, r"q: got .* with at least one token"),
    "q dtype": ({"q": torch.zeros(2, 7, 4, 3).long()}, r"q: got torch.int64, expected a float"),
    "k short": (
        {"k": torch.zeros(2, 6, 2, 3)},
        r"k: got shape \(2, 6, 2, 3\), expected \(2, S, G, 3\) with S at least 7",
    ),
    "k width": ({"k": torch.zeros(2, 7, 2, 4)}, r"k: got .*expected \(2, S, G, 3\)"),
    "v": ({"v": torch.zeros(2, 8, 2, 5)}, r"v: got .*expected \(2, 7, 2, Dv\)"),
    "k dtype": ({"k": torch.zeros(2, 7, 2, 3).half()}, r"k: got torch.float16.*q, torch.float64"),
    "v dtype": ({"v": torch.zeros(2, 7, 2, 5).half()}, r"v: got torch.float16.*q, torch.float64"),
    "heads": (
        {"k": torch.zeros(2, 7, 3, 3).double(), "v": torch.zeros(2, 7, 3, 5).double()},
        r"k: got 3 heads, expected a number that divides the 4 heads of q",
    ),
    "resets": ({"resets": torch.zeros(2, 7)}, r"resets: got torch.float32 .*torch.bool \(2, 7\)"),
    "num_cached": (
        {"num_cached": torch.zeros(2)},
        r"num_cached: got torch.float32 \(2,\), expected torch.int64 \(2,\)",
    ),
    "window": ({"window": 0}, r"window: got 0, expected at least 1, or None"),
    "backend": ({"backend": "cuda"}, r"backend: got 'cuda', expected one of 'auto'.*'gpu'"),
    "gpu": ({"backend": "gpu"}, r"backend='gpu' needs tensors on a GPU, got cpu"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_argument(change, message):
    with pytest.raises(ValueError, match=f"^attention: {message}"):
        attention(**(make_inputs() | change))
