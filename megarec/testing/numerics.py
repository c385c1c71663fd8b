"""Checks of what a model computes: state, documents, padding, causality, gradients, bfloat16."""

import torch
from torch import Tensor
from torch.nn import functional as F

from megarec.models.backbone import Backbone
from megarec.models.context import Context
from megarec.models.state import State
from megarec.testing.case import (
    FLOAT32,
    NUM_ROWS,
    NUM_TOKENS,
    Case,
    close,
    doc_ids,
    documents,
    kernels,
    require,
    run_steps,
)

# Where sequences are cut in two or more, single tokens included.
CUTS = ((9,), (1, 2, 10), (NUM_TOKENS - 1,), tuple(range(1, NUM_TOKENS)))
PROMPTS = (NUM_TOKENS, 1, 9)
"""Lengths of prompts that are read together."""
NEXT_TOKENS = 4
"""Tokens that are decoded after a sequence, to see whether its state is right."""


@torch.no_grad()
def steps(case: Case) -> None:
    """`forward` equals a loop of `step`: logits at each token, and the state."""
    model, ids = case.model().double(), case.ids()
    logits, state = model(ids, return_state=True)
    expected_logits, expected = run_steps(model, ids, model.init_state(NUM_ROWS))
    case.close("forward against a loop of step: logits", logits, expected_logits, 1e-10)
    case.close_states("forward against a loop of step", state, expected, 1e-10)


@torch.no_grad()
def chunks(case: Case) -> None:
    """Pieces with carried state equal the whole, wherever it is cut; with documents, too."""
    model, ids = case.model().double(), case.ids()
    for name, ctx in (
        ("one document", Context()),
        ("documents", Context.from_doc_ids(doc_ids())),
    ):
        whole, expected = model(ids, ctx=ctx, return_state=True)
        for cuts in CUTS:
            logits, state = _in_pieces(model, ids, ctx, cuts)
            what = f"{name} cut at {cuts} against the whole"
            case.close(f"{what}: logits", logits, whole, 1e-10)
            case.close_states(what, state, expected, 1e-10)


@torch.no_grad()
def packed(case: Case) -> None:
    """Packed documents equal each document alone."""
    ids = case.ids()
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, FLOAT32)):
        model = case.model().to(dtype)
        logits = model(ids, ctx=case.packed())
        for row, piece in documents():
            alone = model(ids[row : row + 1, piece])[0]
            what = f"{dtype}: row {row}, tokens {piece.start} to {piece.stop - 1}, packed or alone"
            case.close(what, logits[row, piece], alone, tolerance)


@torch.no_grad()
def isolation(case: Case) -> None:
    """A document changes no bit of those after it in its row, nor of what is decoded then."""
    model, ids, ctx, document_BT = case.model(), case.ids(), case.packed(), doc_ids()
    after = case.ids(num_tokens=NEXT_TOKENS, seed=1)
    logits, state = model(ids, ctx=ctx, return_state=True)
    decoded, _ = run_steps(model, after, state)
    for first in range(1, int(document_BT.max()) + 1):
        later_BT = document_BT >= first
        other = case.other_ids(ids, ~later_BT)
        other_logits, state = model(other, ctx=ctx, return_state=True)
        other_decoded, _ = run_steps(model, after, state)
        what = f"the documents before number {first} changed:"
        case.same(f"{what} logits after them", other_logits[later_BT], logits[later_BT])
        rows_B = later_BT[:, -1]
        case.same(f"{what} logits of steps", other_decoded[rows_B], decoded[rows_B])


@torch.no_grad()
def padding(case: Case) -> None:
    """Prompts of several lengths, padded on the left, give what each gives alone; then steps do."""
    model = case.model().double()
    ids, after = case.ids(len(PROMPTS)), case.ids(len(PROMPTS), NEXT_TOKENS, seed=1)
    ctx = Context.left_padded(torch.tensor(PROMPTS), NUM_TOKENS)
    for cuts in ((), *CUTS[:2]):
        logits, state = _in_pieces(model, ids, ctx, cuts)
        decoded, _ = run_steps(model, after, state)
        for row, length in enumerate(PROMPTS):
            alone, state = model(ids[row : row + 1, -length:], return_state=True)
            expected, _ = run_steps(model, after[row : row + 1], state)
            what = f"a prompt of {length} tokens, padded and cut at {cuts} or alone"
            case.close(f"{what}: logits", logits[row, -length:], alone[0], 1e-10)
            case.close(f"{what}: logits of steps after it", decoded[row], expected[0], 1e-10)


@torch.no_grad()
def causality(case: Case) -> None:
    """A token changes no bit of the outputs before it."""
    model, ids = case.model(), case.ids()
    logits = model(ids)
    for cut in (1, 8, 13, NUM_TOKENS - 1):
        other = case.other_ids(ids, torch.arange(NUM_TOKENS) >= cut)
        what = f"tokens from {cut} on changed: logits before them"
        case.same(what, model(other)[:, :cut], logits[:, :cut])


def gradients(case: Case) -> None:
    """Gradients of a packed batch equal those of each document alone, in a loop of `step`.

    The loop runs in float64 on the reference kernels and is differentiated by autograd. The
    gradient that flows through a carried state is compared, too.
    """
    model, ids, ctx = case.model().double(), case.ids(), case.packed()
    labels = case.ids(seed=1)
    with kernels("reference"):
        expected_loss = torch.zeros((), dtype=torch.float64)
        for row, piece in documents():
            start = model.init_state(1)
            logits, _ = run_steps(model, ids[row : row + 1, piece], start)
            expected_loss += F.cross_entropy(logits[0], labels[row, piece], reduction="sum")
        expected = _gradients(model, expected_loss)
    for name, gradient in expected.items():
        require(gradient.any(), f"the gradient of {name} is zero")

    logits, _ = _in_pieces(model, ids, ctx, CUTS[1])
    loss_in_pieces = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    narrow = case.model()
    for what, found_model, loss, tolerance in (
        ("float64", model, model(ids, labels, ctx=ctx)[0], 1e-10),
        ("float64, state carried from piece to piece", model, loss_in_pieces, 1e-10),
        ("float32", narrow, narrow(ids, labels, ctx=ctx)[0], 2e-4),
    ):
        case.close(f"{what}: loss", loss.double(), expected_loss, tolerance)
        for name, gradient in _gradients(found_model, loss).items():
            case.close(f"{what}: gradient of {name}", gradient, expected[name], tolerance)


def recomputation(case: Case) -> None:
    """Activation recomputation changes no bit of the gradients."""
    model, ids, labels, ctx = case.model(), case.ids(), case.ids(seed=1), case.packed()
    expected = _gradients(model, model(ids, labels, ctx=ctx)[0])
    for _, block in model.layers():
        block.recompute = True
    for name, gradient in _gradients(model, model(ids, labels, ctx=ctx)[0]).items():
        close(f"recomputed: gradient of {name}", gradient, expected[name], 0)


@torch.no_grad()
def bfloat16(case: Case) -> None:
    """In bfloat16, logits and recurrent memory stay float32, and results near those of float32.

    Near: the error is no more than 4 times what rounding the parameters to bfloat16 makes by
    itself. State below float32 must be a cache of past inputs: a step only appends to it.
    """
    ids, after = case.ids(), case.ids(num_tokens=1, seed=1)
    expected, wide_state = case.model()(ids, return_state=True)
    rounding = (case.model().bfloat16().float()(ids) - expected).norm()
    model = case.narrow_model()
    logits, state = model(ids, return_state=True)
    _, next_state = run_steps(model, after, state)
    require(logits.dtype == torch.float32, f"bfloat16: logits are {logits.dtype}")
    ratio = float((logits - expected).norm() / rounding)
    require(ratio <= 4, f"bfloat16: logits are off by {ratio:.1f} times what rounding explains")
    start = model.init_state(NUM_ROWS)
    for key, value in state.items():
        require(value.shape == wide_state[key].shape, f"bfloat16: state {key}: another shape")
        for tensor in (start[key], next_state[key]):
            what = f"bfloat16: state {key}: {value.dtype} after forward, {tensor.dtype} elsewhere"
            require(tensor.dtype == value.dtype, what)
        if value.dtype == torch.bfloat16:
            what = f"bfloat16: state {key} accumulates below float32"
            require(_is_appended(*(_rows(key, x) for x in (value, next_state[key]))), what)


def _in_pieces(
    model: Backbone, ids: Tensor, ctx: Context, cuts: tuple[int, ...]
) -> tuple[Tensor, State]:
    state = model.init_state(ids.shape[0])
    logits = []
    for start, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        piece = slice(start, end)
        part, state = model(ids[:, piece], ctx=ctx.narrow(piece), state=state, return_state=True)
        logits.append(part)
    return torch.cat(logits, 1), state


def _gradients(model: Backbone, loss: Tensor) -> dict[str, Tensor]:
    names = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    missing = [name for name, grad in zip(names, found, strict=True) if grad is None]
    require(not missing, f"no gradient reaches {', '.join(missing)}")
    return {name: grad.double() for name, grad in zip(names, found, strict=True)}


def _rows(key: str, value: Tensor) -> Tensor:
    # A looped core's state has the recurrence second.
    return value.flatten(0, 1) if key.startswith("core.") else value


def _is_appended(before: Tensor, after: Tensor) -> bool:
    # Either the cache has grown by a token, or its oldest one has left.
    kept = after[:, :-1]
    return torch.equal(kept, before[:, before.shape[1] - kept.shape[1] :])
