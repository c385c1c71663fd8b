"""Generation: a row does not depend on its neighbours, and sampling does what it says."""

import pytest
import torch
from small import random_model

from megarec.errors import UserError
from megarec.generation import Sampling, decode, generate
from megarec.models import Backbone

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [60, 3, 3]]


@pytest.fixture(scope="module")
def model() -> Backbone:
    return random_model()


def greedy_by_forward(model: Backbone, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("piece", [1024, 4])
def test_prompts_of_any_lengths_together_equal_each_alone(
    model: Backbone, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "PREFILL_TOKENS", piece)
    together = generate(model, PROMPTS, max_new_tokens=12)
    assert together == [greedy_by_forward(model, prompt, 12) for prompt in PROMPTS]


def test_padding_never_enters_the_state(model: Backbone) -> None:
    logits, state = decode._prefill(model, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone_logits, alone = decode._prefill(model, [prompt])
        torch.testing.assert_close(logits[row : row + 1], alone_logits, rtol=1e-5, atol=1e-5)
        for key in state:
            torch.testing.assert_close(state[key][row : row + 1], alone[key], rtol=1e-5, atol=1e-5)


def test_a_row_ends_at_the_eod(model: Backbone) -> None:
    free = generate(model, PROMPTS, max_new_tokens=12)
    eod = free[0][4]
    ended = generate(model, PROMPTS, max_new_tokens=12, eod_id=eod)
    expected = [row[: row.index(eod)] if eod in row else row for row in free]
    assert ended == expected


def test_sampling_keeps_to_top_k_and_top_p() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).log_softmax(-1).repeat(2000, 1)
    generator = torch.Generator().manual_seed(0)
    kept = decode.choose(logits, Sampling(temperature=1.0, top_k=2), generator)
    assert set(kept.tolist()) == {1, 2}
    kept = decode.choose(logits, Sampling(temperature=1.0, top_p=0.7), generator)
    assert set(kept.tolist()) == {1, 2}  # 0.64 alone is not enough
    free = decode.choose(logits, Sampling(temperature=1.0), generator)
    share = (free == 1).float().mean().item()
    assert share == pytest.approx(0.644, abs=0.04)


def test_the_seed_decides_the_sample(model: Backbone) -> None:
    def sample(seed: int) -> list[list[int]]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return generate(model, PROMPTS, max_new_tokens=12, sampling=sampling)

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize("prompts", [[], [[]], [[61]], [[-1]]])
def test_bad_prompts(model: Backbone, prompts: list[list[int]]) -> None:
    with pytest.raises(UserError):
        generate(model, prompts, max_new_tokens=1)


def test_bad_sampling_is_reported_at_once() -> None:
    with pytest.raises(UserError) as caught:
        Sampling(temperature=-1, top_k=0, top_p=0)
    assert len(caught.value.lines) == 3
