"""The diffusion-forcing sampler: where all has converged, plain decoding; and what it costs."""

from typing import Any

import pytest
import torch
from looped_models import ATTENTION, looped_tree
from small import model_config, random_model
from torch import Tensor

from megarec.errors import UserError
from megarec.generation import DiffusionForcingConfig, Sampling, diffusion_forcing, generate
from megarec.generation.decode import choose
from megarec.generation.diffusion_forcing import Continuation, Wave
from megarec.models import Backbone
from megarec.models.context import Context
from megarec.models.init import seed_from
from megarec.models.latent import random_latent

MLSTM = {"type": "mlstm", "num_heads": 2, "igate_bias_init": -1.0, "chunk_size": 4}
MAMBA = {"type": "mamba2", "num_heads": 2, "head_dim": 8, "state_dim": 4, "chunk_size": 4}
MIXERS = pytest.mark.parametrize("mixer", [ATTENTION, MLSTM, MAMBA], ids=lambda m: m["type"])
PROMPT = [5, 3, 2, 9]
NEW = 12


def looped(mixer: dict[str, Any], **stack: Any) -> Backbone:
    tree = looped_tree(**({"cache": {"type": "modulo", "slots": 1}} | stack))
    tree["blocks"]["b"]["mixer"] = mixer
    return random_model(model_config(**tree)).double()


def contractive(mixer: dict[str, Any], **stack: Any) -> Backbone:
    """Return a model whose latent states converge: the core reads little of them."""
    model = looped(mixer, update={"type": "euler"}, **stack)
    with torch.no_grad():
        model.stack.adapter.weight[:, : model.config.d_model] *= 0.03
    return model


def sample(
    model: Backbone,
    num_recurrences: int,
    *,
    max_new_tokens: int = NEW,
    eod_id: int | None = None,
    sampling: Sampling | None = None,
    **config: Any,
) -> Continuation:
    return diffusion_forcing(
        model,
        PROMPT,
        max_new_tokens=max_new_tokens,
        config=DiffusionForcingConfig(**config),
        sampling=sampling,
        eod_id=eod_id,
        num_recurrences=num_recurrences,
    )


def plain(model: Backbone, num_recurrences: int) -> list[int]:
    return generate(model, [PROMPT], max_new_tokens=NEW, num_recurrences=num_recurrences)[0]


@pytest.mark.parametrize("mixer", [ATTENTION, MLSTM], ids=lambda m: m["type"])
@pytest.mark.parametrize(
    "config",
    [
        {"inner_recurrence": 1, "threshold": 1e-9},
        {"inner_recurrence": 4, "threshold": 1e-9, "max_wavefront": 3, "ema_embeds": 0.5},
        {"inner_recurrence": 16, "threshold": 1e-9, "headway": 3},
        # Each round converges, though to what the prelude gave a while ago.
        {"inner_recurrence": 30, "threshold": 1e-6, "ema_embeds": 0.5, "headway": 2},
        {"inner_recurrence": 4, "freeze": "fixed"},
        {"inner_recurrence": 8, "freeze": "fixed", "headway": 4, "ema_embeds": 0.0},
        {"inner_recurrence": 32, "freeze": "fixed", "state_noise_mixing": 0.5},
    ],
)
def test_what_has_converged_is_plain_decoding(
    mixer: dict[str, Any], config: dict[str, Any]
) -> None:
    model = contractive(mixer)
    converged = plain(model, 40)
    assert len(set(converged)) > 3 and converged != plain(model, 1)
    # Where convergence decides, no token may freeze before it by its number of recurrences.
    most = 60 if config.get("freeze") == "fixed" else 1000
    assert sample(model, most, **config).ids == converged


def test_the_model_may_have_any_cache() -> None:
    """Where all recurrences are alike, all caches are."""
    expected = plain(contractive(MLSTM), 40)
    for cache in ({"type": "full"}, {"type": "modulo", "slots": 3}):
        model = contractive(MLSTM, cache=cache)
        assert plain(model, 40) == sample(model, 60, inner_recurrence=8).ids == expected


@MIXERS
@pytest.mark.parametrize(
    "stack",
    [
        {},
        {"norm_core_output": True, "update": {"type": "gated"}},
        {"step_signal": "learned", "num_step_embeddings": 3, "initial_state": "zero"},
        {"step_signal": "sinusoid", "inject": "add", "initial_state": "embedding"},
    ],
)
def test_one_token_at_a_time_is_plain_decoding_of_any_model(
    mixer: dict[str, Any], stack: dict[str, Any]
) -> None:
    """All recurrences in one round: nothing need converge."""
    model = looped(mixer, **stack)
    expected = plain(model, 5)
    assert expected != plain(model, 4)
    assert sample(model, 5, inner_recurrence=5).ids == expected


def test_what_it_costs() -> None:
    alone = sample(looped(ATTENTION), 6, inner_recurrence=6)
    # Each token but the last: a round of its own, and its last recurrence again for its state.
    assert alone.core_passes == alone.token_recurrences == (NEW - 1) * (6 + 1)

    model = contractive(ATTENTION)
    # Three rounds a token, one token a round: the wave is three wide, but for its two ends.
    fixed = sample(model, 24, inner_recurrence=8, freeze="fixed", threshold=9.0)
    assert fixed.core_passes == 8 * (NEW - 1 + 2) + (NEW - 1)
    assert fixed.token_recurrences == (NEW - 1) * (24 + 1)
    # A looser threshold lets tokens freeze sooner.
    loose, tight = (sample(model, 40, inner_recurrence=1, threshold=t) for t in (0.3, 1e-6))
    assert loose.token_recurrences < 0.6 * tight.token_recurrences
    narrow = sample(model, 40, inner_recurrence=1, threshold=1e-6, max_wavefront=2)
    assert narrow.core_passes > tight.core_passes
    assert narrow.token_recurrences <= 3 * narrow.core_passes


@pytest.mark.parametrize("headway", [1, 3])
def test_tokens_freeze_as_they_were_read(headway: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little has converged: what the state is made of is the text that comes out."""
    read, run = [], Wave._run

    def spy(wave: Wave, ids: list[int], *args: Any, refine: bool = False) -> Any:
        if not refine:
            read.extend(ids)
        return run(wave, ids, *args, refine=refine)

    monkeypatch.setattr(Wave, "_run", spy)
    hasty = sample(looped(ATTENTION), 6, inner_recurrence=1, threshold=0.8, headway=headway)
    assert read == [*PROMPT, *hasty.ids[:-1]]
    assert hasty.core_passes < 4 * NEW


@pytest.mark.parametrize("headway", [1, 3])
def test_recurrences_count_on_the_token_that_freezes(
    headway: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those made on another guess do not, however much has changed."""
    read: dict[int, list[int]] = {}
    run = Wave._run

    def spy(wave: Wave, ids: list[int], *args: Any, refine: bool = False) -> Any:
        for position, token in enumerate(ids, int(wave.state["core.pos"])):
            if refine:
                read.setdefault(position, []).append(token)
        return run(wave, ids, *args, refine=refine)

    monkeypatch.setattr(Wave, "_run", spy)
    found = sample(looped(ATTENTION), 6, inner_recurrence=2, freeze="fixed", headway=headway)
    for position, token in enumerate(found.ids[:-1], len(PROMPT)):
        assert read[position][-3:] == [token] * 3
    # Some were something else at first.
    assert any(len(set(tokens)) > 1 for tokens in read.values())


def test_random_choices_hang_on_seed_and_position() -> None:
    model = contractive(ATTENTION)
    sampling = Sampling(temperature=1.0, top_k=20, seed=3)
    ids, state = [], model.init_state(1, 40)
    logits_1TV, state = model(
        torch.tensor([PROMPT]), state=state, return_state=True, num_recurrences=40
    )
    logits_1V = logits_1TV[:, -1]
    for position in range(len(PROMPT), len(PROMPT) + NEW):
        generator = torch.Generator().manual_seed(seed_from("token", 3, position))
        chosen_1 = choose(logits_1V, sampling, generator)
        ids += chosen_1.tolist()
        logits_1V, state = model.step(chosen_1, state, num_recurrences=40)
    config = {"inner_recurrence": 4, "threshold": 1e-9}
    assert sample(model, 160, sampling=sampling, **config).ids == ids
    other = Sampling(temperature=1.0, top_k=20, seed=4)
    assert sample(model, 160, sampling=other, **config).ids != ids


@torch.no_grad()
def test_where_a_round_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = looped(ATTENTION), Sampling(seed=7)
    config = DiffusionForcingConfig(
        inner_recurrence=2, freeze="fixed", headway=2, ema_embeds=0.25, state_noise_mixing=0.5
    )
    wave = Wave(model, config, sampling, 8)
    wave.read(PROMPT)
    begun: list[Tensor] = []
    recurrence = model.stack.recurrence

    def spy(i: Tensor, latent: Tensor, *args: Any) -> Any:
        if int(i.max()) % 2 == 0:
            begun.append(latent)
        return recurrence(i, latent, *args)

    monkeypatch.setattr(model.stack, "recurrence", spy)
    e, latent = torch.zeros(1, 0, 16).double(), torch.zeros(1, 0, 16).double()
    for number in range(3):
        ids = list(wave.ids)
        assert len(ids) == 1 + 2 * number and wave.advance(99) == []
        # The prelude over the whole text, and the share that it had in the round before.
        whole, _ = model.block(0)(model.embed(torch.tensor([PROMPT + ids])), Context())
        new, old = whole[:, len(PROMPT) :], e.shape[1]
        e = torch.cat([0.75 * new[:, :old] + 0.25 * e, new[:, old:]], 1)
        torch.testing.assert_close(wave.refined.e_1TD, e, rtol=0, atol=1e-10)
        position = torch.arange(len(PROMPT), len(PROMPT) + len(ids))[None]
        std = model.config.stack.initial_std
        initial, noise = (
            random_latent(position, None, 16, std, *seed).double() for seed in ((), (7, number))
        )
        latent = torch.cat([latent, initial[:, old:]], 1)
        # Those of the last round have made 2 recurrences, and those before 2 more each.
        steps = torch.tensor([2.0 * (number - (t + 1) // 2) for t in range(len(ids))])
        share = 0.5 / (1 + steps.double())[:, None]
        expected = (1 - share) * latent + share * noise
        torch.testing.assert_close(begun[-1], expected, rtol=0, atol=1e-10)
        latent = wave.refined.latent_1TD


@pytest.mark.parametrize("threshold", [1e-9, 0.5])
def test_the_text_ends_at_the_eod_or_the_last_token(threshold: float) -> None:
    model = contractive(ATTENTION)
    config = {"inner_recurrence": 2, "threshold": threshold}
    whole = sample(model, 60, **config).ids
    eod = whole[5]
    assert sample(model, 60, eod_id=eod, **config).ids == whole[: whole.index(eod)]
    for count in (0, 1, 4):
        assert sample(model, 60, max_new_tokens=count, **config).ids == whole[:count]


def test_models_without_the_sampler() -> None:
    with pytest.raises(UserError, match="diffusion_forcing: model.stack is not looped"):
        diffusion_forcing(random_model(), PROMPT, max_new_tokens=1)
    with pytest.raises(UserError, match="has learned when to stop .stack.halt=act."):
        sample(looped(ATTENTION, halt={"type": "act"}), 4)
    with pytest.raises(UserError, match="num_recurrences=0: expected at least 1"):
        sample(looped(ATTENTION), 0)
    with pytest.raises(UserError, match="prompt 0: empty"):
        diffusion_forcing(looped(ATTENTION), [], max_new_tokens=1)
