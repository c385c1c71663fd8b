"""The backbone's loss and head; what holds for every mixer is in tests/contract."""

import pytest
import torch
from small import model_config, random_model
from torch.nn import functional as F

from megarec.models import Backbone
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


def test_rows_of_one_document_need_no_resets() -> None:
    assert Context.from_doc_ids(torch.zeros(2, 5, dtype=torch.int32)).resets is None


def test_tied_embeddings_share_one_matrix(ids: torch.Tensor) -> None:
    model = random_model(model_config(head={"tie_embeddings": True}))
    assert "head.weight" not in dict(model.named_parameters())
    x, _ = model.features(ids)
    torch.testing.assert_close(model(ids), F.linear(x, model.embedding.weight))
