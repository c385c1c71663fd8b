"""An imported Nemotron-H computes what transformers and a float64 reference compute."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from megarec.conversion import load_model
from megarec.conversion.target import target_for_export
from megarec.models import Backbone
from megarec.models.context import Context

GOLDEN = Path(__file__).parents[1] / "golden/hybrid/nemotron_h"


@pytest.fixture(params=["reference", "eager"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAREC_KERNELS", request.param)


@pytest.fixture(scope="module")
def arrays() -> dict[str, Any]:
    with numpy.load(GOLDEN / "golden.npz") as file:
        return {
            name: torch.from_numpy(file[name]) if file[name].dtype.kind != "U" else file[name]
            for name in file.files
        }


@pytest.fixture
def model() -> Backbone:
    return load_model(GOLDEN)[0]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_size(model: Backbone) -> None:
    assert "".join(model.config.pattern) == "M-M*M-"
    assert model.config.num_params() == sum(p.numel() for p in model.parameters()) == 160_968


def test_logits(model: Backbone, arrays: dict[str, Any]) -> None:
    assert_close(model(arrays["input_ids"]), arrays["logits"])


def test_every_layer(model: Backbone, arrays: dict[str, Any]) -> None:
    hidden = arrays["hidden_states"]
    x = model.embedding(arrays["input_ids"])
    torch.testing.assert_close(x, hidden[0], rtol=0, atol=0)
    # The last of theirs is that of the last layer after the norm.
    for i in range(5):
        x, _ = model.blocks[str(i)](x, Context())
        assert_close(x, hidden[i + 1])
    x, _ = model.blocks["5"](x, Context())
    assert_close(model.norm(x), hidden[6])


def test_the_first_mixer(model: Backbone, arrays: dict[str, Any]) -> None:
    block = model.blocks["0"]
    x = block.mixer_norm(model.embedding(arrays["input_ids"]))
    assert_close(x, arrays["mixer_in"])
    y, state = block.mixer(x, Context())
    assert_close(y, arrays["mixer_out"])
    assert_close(state["C"].transpose(-1, -2), arrays["mixer_final_state"])


def test_two_segments(model: Backbone, arrays: dict[str, Any]) -> None:
    ids = arrays["input_ids"]
    first, state = model(ids[:, :30], return_state=True)
    second = model(ids[:, 30:], state=state)
    assert_close(torch.cat([first, second], 1), arrays["logits"])


def test_step_by_step(model: Backbone, arrays: dict[str, Any]) -> None:
    ids_BT = arrays["input_ids"]
    state = model.init_state(len(ids_BT))
    for t in range(ids_BT.shape[1]):
        logits_BV, state = model.step(ids_BT[:, t], state)
        assert_close(logits_BV, arrays["logits"][:, t])


def test_greedy_tokens(model: Backbone, arrays: dict[str, Any]) -> None:
    logits_BTV, state = model(arrays["prompt"], return_state=True)
    tokens = [*arrays["prompt"].unbind(1), logits_BTV[:, -1].argmax(-1)]
    while len(tokens) < arrays["generated"].shape[1]:
        logits_BV, state = model.step(tokens[-1], state)
        tokens.append(logits_BV.argmax(-1))
    assert torch.equal(torch.stack(tokens, 1), arrays["generated"])


def test_loss_and_gradients(model: Backbone, arrays: dict[str, Any]) -> None:
    ids = arrays["input_ids"]
    loss_sum, num_tokens = model(ids[:, :-1], ids[:, 1:])
    loss = loss_sum / num_tokens
    loss.backward()
    torch.testing.assert_close(loss.item(), float(arrays["loss"]), rtol=0, atol=1e-5)

    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients = target_for_export(model.config).export_tensors(model.config, own)
    names = [name.replace("model.", "backbone.") for name in arrays["grad_names"]]
    assert set(names) == gradients.keys()
    norms = torch.stack([gradients[name].norm() for name in names]).double()
    torch.testing.assert_close(norms, arrays["grad_norms"].double(), rtol=1e-4, atol=0)
