"""What is special to mLSTM: soft resets, the paper's initial weights, gates in float32."""

import pytest
import torch
from small import model_tree, random_model

from megarec.config.model import ModelConfig
from megarec.models import build_model
from megarec.models.context import Context
from megarec.models.mixers.mlstm import MLSTMConfig


def test_soft_resets_are_soft_and_padding_fences_are_not() -> None:
    ids = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(0))
    tree = model_tree()
    tree["blocks"]["mlstm"]["mixer"]["document_reset"] = "soft"
    soft = random_model(ModelConfig.model_validate(tree)).double()
    exact = random_model().double()
    doc_ids = torch.tensor([[0] * 11 + [1] * 10] * 2)
    ctx = Context.from_doc_ids(doc_ids)
    difference = (soft(ids, ctx=ctx) - exact(ids, ctx=ctx))[:, 11:].abs().max()
    assert 0 < difference < 1e-6  # e^-25 of the state before
    fenced = Context(ctx.resets, exact=True)
    assert torch.equal(soft(ids, ctx=fenced), exact(ids, ctx=fenced))


def test_the_papers_initialisation() -> None:
    tree = model_tree(d_model=256, num_layers=3, vocab_size=500)
    mixer = {"type": "mlstm", "num_heads": 4, "igate_bias_init": -10.0}
    tree["blocks"] = {"mlstm": {"mixer": mixer, "ffn": {"d_ff": 512}}}
    model = build_model(ModelConfig.model_validate(tree), seed=3)
    small, wang = (2 / (5 * 256)) ** 0.5, 2 / 3 / 256**0.5
    block = model.blocks["1"]
    deviations = {
        small: (model.embedding, model.head, block.mixer.q, block.mixer.v, block.ffn.up),
        wang: (block.mixer.out_proj, block.ffn.down),
        0.0: (block.mixer.ogate, block.mixer.gates.igate, block.mixer.gates.fgate),
    }
    for expected, modules in deviations.items():
        for module in modules:
            assert module.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert (block.mixer.gates.igate.bias == -10).all()
    torch.testing.assert_close(block.mixer.gates.fgate.bias, torch.linspace(3, 6, 4))
    assert (block.mixer.norm.weight == 1).all() and (model.norm.weight == 1).all()


def test_the_gates_keep_float32() -> None:
    mixer = MLSTMConfig(num_heads=2).build(16)
    names = [name for name, _ in mixer.named_parameters()]
    kept = {name for name in names if name.startswith(mixer.float32_modules)}
    assert kept == {f"gates.{g}.{leaf}" for g in ("igate", "fgate") for leaf in ("weight", "bias")}


def test_bfloat16_keeps_gates_and_state_in_float32() -> None:
    ids = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(0))
    model = random_model().bfloat16()
    for block in model.blocks.values():
        block.mixer.gates.float()
    logits, state = model(ids, return_state=True)
    assert logits.dtype == torch.float32
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    wide = random_model()(ids)
    assert (logits - wide).square().mean().sqrt() < 0.05 * wide.square().mean().sqrt()
