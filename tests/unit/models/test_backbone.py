"""The backbone's contract: loss, state, documents, steps, and weights that depend on seeds only."""

import pytest
import torch
from small import model_config, model_tree, random_model
from torch.nn import functional as F

from megarec.config.model import ModelConfig
from megarec.models import Backbone, build_model
from megarec.models.context import Context


@pytest.fixture(scope="module")
def model() -> Backbone:
    return random_model().double()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(0))


def test_the_loss_is_the_sum_of_cross_entropies(model: Backbone, ids: torch.Tensor) -> None:
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    loss_sum, num_tokens = model(ids, labels=labels)
    expected = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum")
    assert num_tokens == 40
    torch.testing.assert_close(loss_sum, expected, rtol=1e-12, atol=0)


def test_z_loss_is_of_training_only(ids: torch.Tensor) -> None:
    head = {"soft_cap": 30.0, "z_loss": 0.1}
    model = random_model(model_config(head=head)).double()
    plain, _ = model(ids, labels=ids)
    model.train()
    trained, _ = model(ids, labels=ids)
    expected = 0.1 * model(ids).logsumexp(-1).square().sum()
    torch.testing.assert_close(trained - plain, expected)


def test_no_labels_give_loss_zero_and_finite_gradients(ids: torch.Tensor) -> None:
    model = random_model()
    loss_sum, num_tokens = model(ids, labels=torch.full_like(ids, -100))
    loss_sum.backward()
    assert loss_sum == 0 and num_tokens == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_forward_is_a_loop_of_steps(model: Backbone, ids: torch.Tensor) -> None:
    logits, state = model(ids, return_state=True)
    loop = model.init_state(2)
    for t in range(ids.shape[1]):
        step_logits, loop = model.step(ids[:, t], loop)
        torch.testing.assert_close(step_logits, logits[:, t], rtol=1e-9, atol=1e-9)
    assert state.keys() == loop.keys()
    for key in state:
        torch.testing.assert_close(state[key], loop[key], rtol=1e-9, atol=1e-9)


def test_carried_state_equals_the_whole(model: Backbone, ids: torch.Tensor) -> None:
    whole = model(ids)
    first, state = model(ids[:, :9], return_state=True)
    second, _ = model(ids[:, 9:], state=state, return_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-9, atol=1e-9)


def test_packed_documents_equal_each_alone(model: Backbone, ids: torch.Tensor) -> None:
    doc_ids = torch.tensor([[0] * 5 + [1] * 12 + [2] * 4, [0] * 20 + [1]])
    packed = model(ids, ctx=Context.from_doc_ids(doc_ids))
    for row, cuts in enumerate([(0, 5, 17, 21), (0, 20, 21)]):
        for start, end in zip(cuts, cuts[1:], strict=False):
            alone = model(ids[row : row + 1, start:end])[0]
            torch.testing.assert_close(packed[row, start:end], alone, rtol=1e-10, atol=1e-10)


def test_a_reset_hides_the_document_before_bitwise(ids: torch.Tensor) -> None:
    model = random_model()
    ctx = Context.from_doc_ids(torch.tensor([[0] * 11 + [1] * 10] * 2))
    other = ids.clone()
    other[:, :11] = (ids[:, :11] + 7) % 61
    assert torch.equal(model(ids, ctx=ctx)[:, 11:], model(other, ctx=ctx)[:, 11:])


def test_soft_resets_are_soft_and_padding_fences_are_not(ids: torch.Tensor) -> None:
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


def test_no_token_sees_the_future(model: Backbone, ids: torch.Tensor) -> None:
    other = ids.clone()
    other[:, 13:] = (ids[:, 13:] + 1) % 61
    assert torch.equal(model(ids)[:, :13], model(other)[:, :13])


def test_rows_of_one_document_need_no_resets() -> None:
    assert Context.from_doc_ids(torch.zeros(2, 5, dtype=torch.int32)).resets is None


def test_recomputing_activations_changes_nothing(ids: torch.Tensor) -> None:
    gradients = []
    for recompute in (False, True):
        model = random_model().train()
        for block in model.blocks.values():
            block.recompute = recompute
        model(ids, labels=ids)[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_seed_alone_makes_the_weights() -> None:
    first, again, other = (build_model(model_config(), seed=seed) for seed in (1, 1, 2))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    # Names are hashed too: equal shapes get different numbers.
    blocks = first.blocks
    assert not torch.equal(blocks["0"].mixer.q.weight, blocks["1"].mixer.q.weight)


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


def test_tied_embeddings_share_one_matrix(ids: torch.Tensor) -> None:
    model = random_model(model_config(head={"tie_embeddings": True}))
    assert "head.weight" not in dict(model.named_parameters())
    x, _ = model.features(ids)
    torch.testing.assert_close(model(ids), F.linear(x, model.embedding.weight))


def test_bfloat16_keeps_gates_and_state_in_float32(ids: torch.Tensor) -> None:
    model = random_model().bfloat16()
    for block in model.blocks.values():
        block.mixer.gates.float()
    logits, state = model(ids, return_state=True)
    assert logits.dtype == torch.float32
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    wide = random_model()(ids)
    assert (logits - wide).square().mean().sqrt() < 0.05 * wide.square().mean().sqrt()
