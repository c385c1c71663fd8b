"""What tells a looped core the step it is at; and the Universal Transformer made of it."""

import math

import pytest
import torch
from looped_models import looped_config, looped_tree
from small import model_config, random_model
from torch import Tensor
from torch.nn import functional as F

from megarec.models import Backbone
from megarec.models.context import Context
from megarec.models.looped import sinusoid

D = 16


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))


def wave(number: int, d_model: int = D) -> Tensor:
    """Sin in even channels, cos in odd ones (arXiv 1706.03762, section 3.5)."""
    angles = [number / 10_000 ** (2 * (c // 2) / d_model) for c in range(d_model)]
    values = [math.cos(a) if c % 2 else math.sin(a) for c, a in enumerate(angles)]
    return torch.tensor(values, dtype=torch.float64)


def test_sinusoids() -> None:
    numbers = torch.tensor([[0, 1, 2], [7, 100, 3000]])
    found = sinusoid(numbers, D)
    assert found.dtype == torch.float32 and found.shape == (2, 3, D)
    expected = torch.stack([torch.stack([wave(int(n)) for n in row]) for row in numbers])
    # Float32 holds an angle of 3000 to 1e-4.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=1e-6)
    assert sinusoid(torch.tensor(3), 5).shape == (5,)


def universal() -> Backbone:
    """A model of one block with norms behind the sums, two steps after a prelude's."""
    block = {
        "mixer": {"type": "attention", "num_heads": 2, "rope": None},
        "ffn": {"type": "gelu", "d_ff": 24},
        "norm_placement": "post",
    }
    stack = {
        "prelude": 0,
        "core": 1,
        "coda": 0,
        "inject": "none",
        "step_signal": "sinusoid",
        "initial_state": "embedding",
        "num_recurrences": 3,
    }
    tree = looped_tree(**stack) | {"num_layers": 1, "blocks": {"b": block}}
    return random_model(model_config(**tree)).double()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def test_the_universal_transformer_written_out(ids: Tensor) -> None:
    """A^t = norm(H + Att(H)), H^t = norm(A^t + FFN(A^t)), H = H^(t-1) + P^t (arXiv 1807.03819)."""
    model = universal()
    block = model.block(0)
    assert block.mixer is not None and block.ffn is not None
    h = model.embedding(ids)
    for t in (1, 2, 3):
        position = torch.stack([wave(i) for i in range(9)]) + wave(t)
        h = h + position
        attended, _ = block.mixer(h, Context())
        a = rms_norm(h + attended, block.mixer_residual.norm.weight)
        passed_on = F.gelu(a @ block.ffn.up.weight.T) @ block.ffn.down.weight.T
        h = rms_norm(a + passed_on, block.ffn_residual.norm.weight)
    expected = rms_norm(h, model.norm.weight) @ model.head.weight.T
    # The sinusoids are float32's.
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5)
    names = {name for name, _ in block.named_parameters()}
    assert not {"mixer_norm.weight", "ffn_norm.weight"} & names


def test_positions_of_documents_and_of_decoding_start_anew(ids: Tensor) -> None:
    model = universal()
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[:, 4] = True
    packed = model(ids, ctx=Context(resets=resets))
    torch.testing.assert_close(packed[:, :4], model(ids[:, :4]), rtol=0, atol=1e-12)
    torch.testing.assert_close(packed[:, 4:], model(ids[:, 4:]), rtol=0, atol=1e-12)
    state = model.init_state(2)
    for t in range(9):
        logits, state = model.step(ids[:, t], state)
        torch.testing.assert_close(logits, model(ids)[:, t], rtol=0, atol=1e-12)


def test_a_vector_a_step_the_last_one_for_all_later_steps(ids: Tensor) -> None:
    config = looped_config(inject="add", step_signal="learned", num_step_embeddings=2)
    model, ctx = random_model(config).double(), Context(latent=torch.zeros(2, 9, D))
    vectors = model.stack.step_embedding.weight
    assert vectors.shape == (2, D)
    e, _ = model.block(0)(model.embedding(ids), ctx)
    s = torch.zeros(2, 9, D, dtype=torch.float64)
    for step in (0, 1, 1, 1):
        u = s + e + vectors[step]
        s = model.block(2)(model.block(1)(u, ctx)[0], ctx)[0]
    z, _ = model.block(3)(s, ctx)
    expected = F.linear(model.norm(z), model.head.weight)
    torch.testing.assert_close(model(ids, ctx=ctx), expected, rtol=0, atol=1e-12)
