"""Patterns of blocks with a mixer, an FFN or both; FFN kinds; scales of the residual stream."""

import math
from typing import Any

import pytest
import torch
from small import model_config, random_model
from torch import Tensor
from torch.nn import functional as F

from megarec.config.model import ModelConfig
from megarec.models import Backbone
from megarec.models.context import Context

MIXER = {"type": "mlstm", "num_heads": 2, "igate_bias_init": -1.0, "chunk_size": 8}
ATTENTION = {"type": "attention", "num_heads": 2}
BLOCKS: dict[str, Any] = {
    "M": {"mixer": MIXER},
    "-": {"ffn": {"d_ff": 48, "type": "squared_relu"}},
    "*": {"mixer": ATTENTION},
    "both": {"mixer": MIXER, "ffn": {"d_ff": 40}},
}


def config(pattern: Any, num_layers: int | None = None, **changes: Any) -> ModelConfig:
    return model_config(
        blocks=BLOCKS | changes.pop("blocks", {}),
        pattern=pattern,
        num_layers=num_layers or len(pattern),
        **changes,
    )


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(0))


def kinds(model: Backbone) -> list[str]:
    """Describe each layer by what it holds."""
    described = []
    for _, block in model.layers():
        parts = [] if block.mixer is None else [block.mixer.config.type]
        described.append("+".join(parts + ([] if block.ffn is None else ["ffn"])))
    return described


def test_a_string_is_a_name_a_character() -> None:
    listed = config(["M", "-", "M", "*", "-", "M"])
    assert config("M-M*-M") == listed
    expected = ["mlstm", "ffn", "mlstm", "attention", "ffn", "mlstm"]
    assert kinds(random_model(listed)) == expected


def test_a_short_pattern_is_cycled() -> None:
    cycled = random_model(config("M-*", num_layers=6))
    assert kinds(cycled) == ["mlstm", "ffn", "attention"] * 2
    assert cycled.config.num_params() == config("M-*M-*").num_params()
    listed = random_model(config(["both", "*", "both", "-"]))
    assert kinds(listed) == ["mlstm+ffn", "attention", "mlstm+ffn", "ffn"]


@pytest.mark.parametrize("pattern", ["M", "-", "*", "M-M*-", ["both"], ["both", "-", "*"]], ids=str)
def test_sizes_are_those_of_what_is_built(pattern: Any) -> None:
    model = random_model(config(pattern))
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params()
    state = model.init_state(1)
    # A cache of keys is empty before the first token: only its position is there.
    grows = {name for name in state if name.endswith((".k", ".v"))}
    size = sum(x.numel() * x.element_size() for name, x in state.items() if name not in grows)
    assert size == model.config.state_bytes(0)


def test_blocks_without_a_mixer_have_no_state_and_no_norm_for_it() -> None:
    model = random_model(config("M-*"))
    names = {name.split(".", 2)[2] for name, _ in model.named_parameters() if ".1." in name}
    assert names == {"ffn_norm.weight", "ffn.up.weight", "ffn.down.weight"}
    names = {name.split(".")[2] for name, _ in model.named_parameters() if ".2." in name}
    assert names == {"mixer_norm", "mixer"}
    assert {name.split(".")[1] for name in model.init_state(1)} == {"0", "2"}
    assert model.blocks["1"].float32_modules() == []
    assert len(model.blocks["0"].float32_modules()) == 1


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_residual_stream_by_hand(ids: Tensor, scale: float) -> None:
    blocks = {name: block | {"residual_scale": scale} for name, block in BLOCKS.items()}
    model = random_model(config(["both", "-", "*"], blocks=blocks)).double()
    ctx = Context.from_doc_ids(torch.tensor([[0] * 5 + [1] * 8] * 2))
    x = model.embedding(ids)
    for _, block in model.layers():
        if block.mixer is not None:
            x = x + scale * block.mixer(block.mixer_norm(x), ctx)[0]
        if block.ffn is not None:
            x = x + scale * block.ffn(block.ffn_norm(x))
    features, _ = model.features(ids, ctx)
    torch.testing.assert_close(features, model.norm(x), rtol=1e-12, atol=1e-12)
    # One block may be scaled and another not.
    if scale != 1:
        mixed = config(["both", "-", "*"], blocks={"*": blocks["*"]})
        assert [layer.residual_scale for layer in mixed.layers] == [1.0, 1.0, scale]


FFN = {
    "swiglu": lambda x, gate, up, down: (
        ((x @ gate.T) / (1 + (-(x @ gate.T)).exp()) * (x @ up.T)) @ down.T
    ),
    "squared_relu": lambda x, gate, up, down: ((x @ up.T).clamp_min(0) ** 2) @ down.T,
    "gelu": lambda x, gate, up, down: (
        ((x @ up.T) * 0.5 * (1 + torch.erf((x @ up.T) / math.sqrt(2)))) @ down.T
    ),
}


@pytest.mark.parametrize("kind", FFN)
def test_ffn_kinds_against_their_formulas(kind: str) -> None:
    ffn_config = {"-": {"ffn": {"d_ff": 48, "type": kind}}}
    ffn = random_model(config("-", blocks=ffn_config)).double().blocks["0"].ffn
    gate = None if ffn.gate is None else ffn.gate.weight
    assert (gate is not None) == (kind == "swiglu")
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = FFN[kind](x, gate, ffn.up.weight, ffn.down.weight)
    torch.testing.assert_close(ffn(x), expected, rtol=1e-12, atol=1e-12)


def test_scaled_embeddings(ids: Tensor) -> None:
    scaled = random_model(config("M-", embedding_scale=8.0)).double()
    plain = random_model(config("M-")).double()
    with torch.no_grad():
        plain.embedding.weight.mul_(8.0)
    torch.testing.assert_close(scaled(ids), plain(ids), rtol=1e-12, atol=1e-12)
    steps = (model.step(ids[:, 0], model.init_state(2))[0] for model in (scaled, plain))
    torch.testing.assert_close(next(steps), next(steps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_scaled_logits_and_their_loss(ids: Tensor, soft_cap: float | None, tied: bool) -> None:
    head = {"logit_scale": 0.125, "soft_cap": soft_cap, "tie_embeddings": tied, "chunk_size": 4}
    # With tied embeddings the scale is of the logits alone, not of the embeddings too.
    model = random_model(config("M-", head=head)).double()
    x, _ = model.features(ids)
    weight = model.embedding.weight if tied else model.head.weight
    expected = 0.125 * x @ weight.T
    if soft_cap is not None:
        expected = soft_cap * torch.tanh(expected / soft_cap)
    logits = model(ids)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    loss, num_tokens = model(ids, labels=labels)
    entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, entropy, rtol=1e-12, atol=0)
    assert num_tokens == 24
    step, _ = model.step(ids[:, 0], model.init_state(2))
    torch.testing.assert_close(step, logits[:, 0], rtol=1e-9, atol=1e-9)


def test_z_loss_is_of_the_scaled_logits(ids: Tensor) -> None:
    head = {"logit_scale": 0.5, "z_loss": 0.1}
    model = random_model(config("M-", head=head)).double()
    plain, _ = model(ids, labels=ids)
    trained, _ = model.train()(ids, labels=ids)
    expected = 0.1 * model(ids).logsumexp(-1).square().sum()
    torch.testing.assert_close(trained - plain, expected)


def test_the_shortest_cache_bounds_the_documents() -> None:
    blocks = {"a": {"mixer": ATTENTION | {"max_seq_len": 100}},
              "b": {"mixer": ATTENTION | {"max_seq_len": 50}}}  # fmt: skip
    assert config(["a", "b", "M"], blocks=blocks).max_seq_len == 50
    assert config(["a", "M"], blocks=blocks).max_seq_len == 100
    assert config("M-").max_seq_len is None
