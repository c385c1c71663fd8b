"""The mLSTM mixer: what it declares of its parameters, and its gradients in float64."""

from fnmatch import fnmatch

import pytest
import torch
from small import random_model

from megarec.models.context import Context
from megarec.models.mixers.mlstm import MLSTMConfig


@pytest.mark.parametrize("d_model", [16, 48])
def test_what_it_declares_covers_every_parameter(d_model: int) -> None:
    config = MLSTMConfig(num_heads=2)
    mixer = config.build(d_model)
    names = [name for name, _ in mixer.named_parameters()]
    assert set(mixer.hf_names()) == set(names)
    assert len(set(mixer.hf_names().values())) == len(names)
    for name in names:
        assert sum(fnmatch(name, pattern) for pattern in mixer.tp_plan()) == 1, name
    assert set(mixer.tp_plan().values()) <= {"column", "row", "head", "replicate"}
    assert sum(p.numel() for p in mixer.parameters()) == config.num_params(d_model)
    kept = {n for n in names if n.startswith(tuple(mixer.float32_modules))}
    assert kept == {f"gates.{g}.{leaf}" for g in ("igate", "fgate") for leaf in ("weight", "bias")}


def gradients(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the gradients of a packed batch's loss, and the loss."""
    model = random_model().to(dtype).train()
    ids = torch.randint(61, (2, 27), generator=torch.Generator().manual_seed(1))
    doc_ids = torch.tensor([[0] * 10 + [1] * 17, [0] * 3 + [1] * 5 + [2] * 19])
    loss, _ = model(ids, labels=ids.roll(-1, 1), ctx=Context.from_doc_ids(doc_ids))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.detach()


def test_gradients_equal_those_of_the_sequential_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAREC_KERNELS", "reference")
    expected, expected_loss = gradients(torch.float64)
    monkeypatch.setenv("MEGAREC_KERNELS", "eager")
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        found, loss = gradients(dtype)
        torch.testing.assert_close(loss.double(), expected_loss, rtol=tolerance, atol=0)
        for name, gradient in expected.items():
            error = (found[name].double() - gradient).norm() / gradient.norm()
            assert error < tolerance, (name, dtype, error)
