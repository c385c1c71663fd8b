"""Generation with a looped model: depth, halting, warm starts; a row is a row of its own."""

from typing import Any

import pytest
import torch
from looped_models import ATTENTION, looped_tree
from small import model_config, random_model

from megarec.errors import UserError
from megarec.generation import decode, generate
from megarec.models import Backbone
from megarec.models.context import Context
from megarec.models.halting import Halting, KLConfig, LatentConfig

MLSTM = {"type": "mlstm", "num_heads": 2, "igate_bias_init": -1.0, "chunk_size": 4}
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [60, 3, 3]]
NEW = 10
CACHES = [{"type": "full"}, {"type": "latest"}, {"type": "modulo", "slots": 2}]


def looped(mixer: dict[str, Any] = ATTENTION, **stack: Any) -> Backbone:
    tree = looped_tree(**({"num_recurrences": 6} | stack))
    tree["blocks"]["b"]["mixer"] = mixer
    return random_model(model_config(**tree)).double()


@pytest.mark.parametrize("piece", [1024, 4])
def test_every_token_at_the_depth_that_is_asked_for(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "PREFILL_TOKENS", piece)
    model, rows = looped(), []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NEW):
            ids.append(int(model(torch.tensor([ids]), num_recurrences=3)[0, -1].argmax()))
        rows.append(ids[len(prompt) :])
    counted = Halting()
    found = generate(model, PROMPTS, max_new_tokens=NEW, num_recurrences=3, halting=counted)
    assert found == rows != generate(model, PROMPTS, max_new_tokens=NEW)
    # The last new token is not read.
    assert (counted.num_tokens, counted.mean_steps) == (3 * (NEW - 1), 3)


@torch.no_grad()
def test_prompts_iterate_to_the_end_and_new_tokens_halt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = looped(cache={"type": "latest"})
    logits, state = model(torch.tensor(PROMPTS[1:2]), state=model.init_state(1), return_state=True)
    ids = [int(logits[0, -1].argmax())]
    while len(ids) < NEW:
        logits, state = model.step(torch.tensor(ids[-1:]), state, num_recurrences=1)
        ids.append(int(logits[0].argmax()))
    at_once = Halting(LatentConfig(threshold=1e9))
    recurrence, made = model.stack.recurrence, []
    monkeypatch.setattr(
        model.stack, "recurrence", lambda i, *args: made.append(i) or recurrence(i, *args)
    )
    assert generate(model, PROMPTS[1:2], max_new_tokens=NEW, halting=at_once) == [ids]
    assert at_once.mean_steps == 1 and len(made) == 6 + (NEW - 1)


@pytest.mark.parametrize("mixer", [ATTENTION, MLSTM], ids=lambda mixer: mixer["type"])
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache["type"])
@pytest.mark.parametrize("warm_start", [False, True])
def test_rows_do_not_depend_on_each_other(
    mixer: dict[str, Any], cache: dict[str, Any], warm_start: bool
) -> None:
    model, rule = looped(mixer, cache=cache), KLConfig(threshold=0.5)
    options: dict[str, Any] = {"max_new_tokens": NEW, "warm_start": warm_start}
    free = generate(model, PROMPTS, halting=Halting(rule), **options)
    options["eod_id"] = free[0][3]
    together, alone = Halting(rule), Halting(rule)
    rows = generate(model, PROMPTS, halting=together, **options)
    assert rows == [generate(model, [p], halting=alone, **options)[0] for p in PROMPTS]
    assert rows == [row[: row.index(free[0][3])] if free[0][3] in row else row for row in free]
    # Rows that ended are not counted.
    assert together.num_tokens == alone.num_tokens < len(PROMPTS) * (NEW - 1)
    assert together.num_steps == alone.num_steps
    assert 1 < together.mean_steps < 6


@torch.no_grad()
@pytest.mark.parametrize("stack", [{}, {"update": {"type": "gated"}}])
def test_a_warm_start_begins_where_the_last_token_ended(stack: dict[str, Any]) -> None:
    model = looped(cache={"type": "modulo", "slots": 1}, num_recurrences=2, **stack)
    latents: list[torch.Tensor] = []
    model.blocks["3"].mixer_norm.register_forward_pre_hook(lambda _, x: latents.append(x[0]))
    state = model.init_state(1)
    logits, state = model(torch.tensor(PROMPTS[1:2]), state=state, return_state=True)
    ids, latent = [int(logits[0, -1].argmax())], latents[-1][:, -1]
    while len(ids) < NEW:
        logits, state = model.step(torch.tensor(ids[-1:]), state, ctx=Context(latent=latent))
        ids.append(int(logits[0].argmax()))
        latent = latents[-1]
    options: dict[str, Any] = {"max_new_tokens": NEW}
    assert generate(model, PROMPTS[1:2], warm_start=True, **options) == [ids]
    assert generate(model, PROMPTS[1:2], **options) != [ids]


def test_options_of_a_loop_where_there_is_none() -> None:
    options: list[dict[str, Any]] = [
        {"num_recurrences": 2},
        {"halting": Halting()},
        {"warm_start": True},
    ]
    for option in options:
        with pytest.raises(UserError, match=f"{next(iter(option))}.*not looped; leave it out"):
            generate(random_model(), PROMPTS, max_new_tokens=2, **option)
    with pytest.raises(UserError, match="num_recurrences=0: expected at least 1"):
        generate(looped(), PROMPTS, max_new_tokens=2, num_recurrences=0)
