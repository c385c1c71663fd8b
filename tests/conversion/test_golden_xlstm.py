"""An imported xLSTM computes what transformers and a float64 reference compute."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megarec.conversion.load import load_model
from megarec.conversion.target import target_for_export
from megarec.models import Backbone


@pytest.fixture(params=["reference", "eager"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAREC_KERNELS", request.param)


@pytest.fixture
def model(golden: Path) -> Backbone:
    return load_model(golden)[0]


@pytest.mark.parametrize("length", [48, 45, 7])
def test_logits_float32(model: Backbone, arrays: dict[str, Any], length: int) -> None:
    logits = model(arrays["ids"][:, :length])
    torch.testing.assert_close(logits, arrays[f"logits_S{length}"], rtol=0, atol=1e-4)


def test_logits_float64(model: Backbone, arrays: dict[str, Any]) -> None:
    logits = model.double()(arrays["ids"])
    torch.testing.assert_close(logits, arrays["logits64_S48"], rtol=0, atol=1e-9)


def test_states(model: Backbone, arrays: dict[str, Any]) -> None:
    _, state = model.double()(arrays["ids"], return_state=True)
    for layer in range(2):
        for key in ("C", "n", "m"):
            expected = arrays[f"state64_{key}_{layer}"].double()
            ours = state[f"blocks.{layer}.{key}"]
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_step_by_step(model: Backbone, arrays: dict[str, Any]) -> None:
    ids_BT = arrays["ids"]
    state = model.init_state(len(ids_BT))
    for t in range(ids_BT.shape[1]):
        logits_BV, state = model.step(ids_BT[:, t], state)
        expected = arrays["logits_step_S48"][:, t]
        torch.testing.assert_close(logits_BV, expected, rtol=0, atol=1e-4)


def test_greedy_tokens(model: Backbone, arrays: dict[str, Any]) -> None:
    prompt = arrays["ids"][:, : int(arrays["greedy_prompt_len"])]
    logits_BTV, state = model(prompt, return_state=True)
    tokens = [logits_BTV[:, -1].argmax(-1)]
    while len(tokens) < 16:
        logits_BV, state = model.step(tokens[-1], state)
        tokens.append(logits_BV.argmax(-1))
    assert torch.equal(torch.stack(tokens, dim=1), arrays["greedy_hf"])
    assert torch.equal(arrays["greedy64"], arrays["greedy_hf"])


@pytest.mark.parametrize(
    ("dtype", "kind", "rtol"), [(torch.float32, "", 1e-4), (torch.float64, "64", 1e-6)]
)
def test_loss_and_gradients(
    model: Backbone, arrays: dict[str, Any], dtype: torch.dtype, kind: str, rtol: float
) -> None:
    ids = arrays["ids"]
    loss_sum, num_tokens = model.to(dtype)(ids[:, :-1], ids[:, 1:])
    loss = loss_sum / num_tokens
    loss.backward()
    torch.testing.assert_close(loss.item(), float(arrays[f"loss{kind}"]), rtol=1e-6, atol=0)

    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients = target_for_export(model.config).export_tensors(model.config, own)
    norms = torch.stack([gradients[name].norm() for name in arrays["grad_names"]])
    torch.testing.assert_close(
        norms.double(), arrays[f"grad_norms{kind}"].double(), rtol=rtol, atol=0
    )
    torch.testing.assert_close(
        norms.double().norm().item(), float(arrays["grad_norm_total64"]), rtol=rtol, atol=0
    )
    for gate in ("igate", "fgate"):
        bias = gradients[f"backbone.blocks.0.mlstm_layer.{gate}_preact.bias"].double()
        expected = arrays[f"grad64_{gate}_bias_0"]
        assert (bias - expected).norm() <= rtol * expected.norm()
