"""What decoding keeps of a looped core, against a table of all keys: no cache changes a result."""

from typing import Any

import pytest
import torch
from looped_models import ATTENTION, looped_tree
from looped_reference import Decoded, LookUp, deepest, modulo
from small import model_config, random_model
from torch import Tensor

from megarec.models import Backbone
from megarec.models.context import Context
from megarec.models.halting import Halting, KLConfig
from megarec.models.state import State

DEPTHS = [3, 1, 5, 2, 5, 1, 4, 3, 5, 2]
PROMPT = 4
"""Tokens that are read together, where there is a prompt."""

MLSTM = {"type": "mlstm", "num_heads": 2, "igate_bias_init": -1.0, "chunk_size": 4}
CACHES: dict[str, tuple[dict[str, Any], LookUp]] = {
    "latest": ({"type": "latest"}, deepest),
    "modulo-1": ({"type": "modulo", "slots": 1}, modulo(1)),
    "modulo-2": ({"type": "modulo", "slots": 2}, modulo(2)),
    "modulo-3": ({"type": "modulo", "slots": 3}, modulo(3)),
}


def looped(cache: dict[str, Any], mixer: dict[str, Any] = ATTENTION, depth: int = 5) -> Backbone:
    tree = looped_tree(cache=cache, num_recurrences=depth)
    tree["blocks"]["b"]["mixer"] = mixer
    return random_model(model_config(**tree)).double()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(61, (2, len(DEPTHS)), generator=torch.Generator().manual_seed(0))


def decode(model: Backbone, ids: Tensor, depths: list[int], prompt: int = 0) -> Tensor:
    """Return the logits of a text whose first tokens are read together."""
    state, rows = model.init_state(len(ids)), []
    if prompt:
        logits, state = model(ids[:, :prompt], state=state, return_state=True)
        rows = list(logits.unbind(1))
    for ids_B, depth in zip(ids[:, prompt:].unbind(1), depths[prompt:], strict=True):
        logits_BV, state = model.step(ids_B, state, num_recurrences=depth)
        rows.append(logits_BV)
    return torch.stack(rows, 1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("prompt", [0, PROMPT])
@pytest.mark.parametrize("name", CACHES)
def test_depths_that_vary_from_token_to_token(
    name: str, prompt: int, window: int | None, ids: Tensor
) -> None:
    cache, look_up = CACHES[name]
    model = looped(cache, ATTENTION | {"window": window})
    depths = [5] * prompt + DEPTHS[prompt:]
    found = decode(model, ids, depths, prompt)
    for row, row_ids in enumerate(ids.tolist()):
        expected = Decoded(model, row_ids, depths, look_up, prompt=prompt)
        close(found[row], expected.logits_TV)
        # That the look-up matters: the first recurrence of every token is another text.
        shallow = Decoded(model, row_ids, depths, lambda made, i: 0, prompt=prompt)
        assert not torch.allclose(found[row], shallow.logits_TV)


@torch.no_grad()
@pytest.mark.parametrize("name", CACHES)
def test_depths_that_vary_from_row_to_row(name: str, ids: Tensor) -> None:
    cache, look_up = CACHES[name]
    model, rule = looped(cache), KLConfig(threshold=0.5)
    together = Context(halting=Halting(rule))
    states = [model.init_state(2), model.init_state(1), model.init_state(1)]
    rows: list[Tensor] = []
    steps: list[list[int]] = [[], []]
    for ids_B in ids.unbind(1):
        logits_BV, states[0] = model.step(ids_B, states[0], ctx=together)
        rows.append(logits_BV)
        for row in range(2):
            alone = Halting(rule)
            logits_1V, states[row + 1] = model.step(
                ids_B[row : row + 1], states[row + 1], ctx=Context(halting=alone)
            )
            close(logits_BV[row], logits_1V[0])
            steps[row].append(alone.num_steps)
    assert sum(map(sum, steps)) == together.halting.num_steps
    assert steps[0] != steps[1] and len(set(steps[0])) > 2
    for row in range(2):
        for key, value in states[0].items():
            close(value[row : row + 1].double(), states[row + 1][key].double())
        expected = Decoded(model, ids[row].tolist(), steps[row], look_up)
        close(torch.stack(rows, 1)[row], expected.logits_TV)


@torch.no_grad()
@pytest.mark.parametrize("mixer", [ATTENTION, MLSTM])
def test_latest_is_full_where_nothing_is_missing(mixer: dict[str, Any], ids: Tensor) -> None:
    full, latest = looped({"type": "full"}, mixer), looped({"type": "latest"}, mixer)
    depths = [5] * len(DEPTHS)
    assert torch.equal(decode(latest, ids, depths, PROMPT), decode(full, ids, depths, PROMPT))


@torch.no_grad()
@pytest.mark.parametrize("mixer", [ATTENTION, MLSTM])
@pytest.mark.parametrize("name", CACHES)
def test_a_prompt_is_read_as_without_a_cache(name: str, mixer: dict[str, Any], ids: Tensor) -> None:
    model = looped(CACHES[name][0], mixer)
    logits, _ = model(ids, return_state=True)
    assert torch.equal(logits, looped({"type": "full"}, mixer)(ids))


@torch.no_grad()
@pytest.mark.parametrize("name", CACHES)
def test_recurrent_mixers_see_those_that_came_so_deep(name: str, ids: Tensor) -> None:
    cache, _ = CACHES[name]
    model = looped(cache, MLSTM)
    found, stack = decode(model, ids, DEPTHS), model.stack
    slots = cache.get("slots", 5)
    # What each block holds, by slot: a token moves the slots that its recurrences reach.
    states: dict[int, list[State]] = {
        b: [model.block(b).init_state(2, torch.device("cpu")) for _ in range(slots)]
        for b in range(4)
    }

    def step(b: int, x: Tensor, slot: int, before: list[State]) -> Tensor:
        x, states[b][slot] = model.block(b).step(x, before[slot])
        return x

    for t, depth in enumerate(DEPTHS):
        before = {b: list(states[b]) for b in states}
        e = step(0, model.embed(ids[:, t]), 0, before[0])
        s = stack.initial_latent(e, torch.tensor([t, t]), Context(), None)
        for i in range(depth):
            s = stack.adapter(torch.cat([s, e], -1))
            for b in stack.core:
                s = step(b, s, i % slots, before[b])
        x = step(3, s, 0, before[3])
        close(found[:, t], model.head(model.norm(x), model.embedding.weight))


@torch.no_grad()
@pytest.mark.parametrize("mixer", [ATTENTION, MLSTM])
@pytest.mark.parametrize("slots", [1, 3])
def test_the_state_of_modulo_does_not_grow_with_depth(
    mixer: dict[str, Any], slots: int, ids: Tensor
) -> None:
    sizes = set()
    for depth in (4, 16):
        model = looped({"type": "modulo", "slots": slots}, mixer, depth).float()
        for asked in (None, 32):
            state = model.init_state(1, asked)
            _, state = model(ids[:1], state=state, return_state=True, num_recurrences=asked)
            sizes.add(sum(x.numel() * x.element_size() for x in state.values()))
        sizes.add(model.config.state_bytes(len(DEPTHS)))
    assert len(sizes) == 1
    full = looped({"type": "full"}, mixer, 16)
    assert full.config.state_bytes(len(DEPTHS)) > 3 * sizes.pop()
