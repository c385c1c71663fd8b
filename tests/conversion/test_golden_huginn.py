"""An imported Huginn computes what the released code computes, every gradient included."""

from pathlib import Path

import pytest
import torch
from conversion.huginn_files import GOLDEN, LOGITS, golden_arrays, released
from safetensors.torch import load_file
from torch import Tensor

from megarec.conversion import load_model
from megarec.conversion.target import target_for_export
from megarec.models import Backbone
from megarec.models.context import Context

STATES = 1e-4
LOSS = 1e-5


@pytest.fixture(params=["reference", "eager"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAREC_KERNELS", request.param)


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    return golden_arrays()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_model(released(tmp_path_factory.mktemp("huginn")))[0]


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def outputs_of(module: torch.nn.Module, seen: list[Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Gather what a block or a norm returns."""

    def gather(_: torch.nn.Module, __: object, output: Tensor | tuple[Tensor, object]) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(gather)


def test_size(model: Backbone) -> None:
    stack = model.config.stack
    assert (stack.prelude, stack.core, stack.coda, stack.num_recurrences) == (1, 2, 1, 8)
    assert (stack.backprop, stack.depth.mean) == (4, 8)
    assert model.config.num_params() == sum(p.numel() for p in model.parameters()) == 157_248


@pytest.mark.parametrize("r", LOGITS)
@torch.no_grad()
def test_logits_and_loss(model: Backbone, arrays: dict[str, Tensor], r: int) -> None:
    ids, ctx = arrays["input_ids"], Context(latent=arrays["s0"])
    assert_close(model(ids, ctx=ctx, num_recurrences=r), arrays[f"r{r}_logits"], LOGITS[r])
    loss_sum, num_tokens = model(ids, arrays["labels"], ctx=ctx, num_recurrences=r)
    assert num_tokens == (arrays["labels"] != -100).sum() == 29
    assert_close(loss_sum / num_tokens, arrays[f"r{r}_loss"].to(loss_sum.dtype), LOSS)


@pytest.mark.parametrize("r", LOGITS)
@torch.no_grad()
def test_every_state(model: Backbone, arrays: dict[str, Tensor], r: int) -> None:
    prelude: list[Tensor] = []
    trace: list[Tensor] = []
    normed: list[Tensor] = []
    # The prelude is block 0, the core ends with block 2, and the last norm comes twice.
    parts = {model.block(0): prelude, model.block(2): trace, model.norm: normed}
    handles = [outputs_of(module, seen) for module, seen in parts.items()]
    model(arrays["input_ids"], ctx=Context(latent=arrays["s0"]), num_recurrences=r)
    for handle in handles:
        handle.remove()
    assert_close(prelude[0], arrays["prelude_out"], STATES)
    assert len(trace) == r and len(normed) == 2
    assert_close(torch.stack(trace), arrays["core_trace"][:r], STATES)
    assert_close(normed[0], arrays[f"r{r}_latent"], STATES)
    assert_close(normed[1], arrays[f"r{r}_head_in"], STATES)


@torch.no_grad()
def test_token_by_token(model: Backbone, arrays: dict[str, Tensor]) -> None:
    state = model.init_state(2, num_recurrences=4)
    for t, ids_B in enumerate(arrays["input_ids"].unbind(1)):
        ctx = Context(latent=arrays["s0"][:, t])
        logits_BV, state = model.step(ids_B, state, ctx=ctx, num_recurrences=4)
        assert_close(logits_BV, arrays["r4_logits"][:, t], LOGITS[4])


@pytest.mark.parametrize(("free", "backprop"), [(4, 4), (0, 8), (7, 1)])
def test_gradients(tmp_path: Path, arrays: dict[str, Tensor], free: int, backprop: int) -> None:
    model, _ = load_model(released(tmp_path / "huginn", mean_backprop_depth=backprop))
    model.train()
    ctx = Context(latent=arrays["s0"])
    # Training mode draws no depth where it is given, and truncates.
    loss_sum, num_tokens = model(
        arrays["input_ids"], arrays["labels"], ctx=ctx, num_recurrences=free + backprop
    )
    loss = loss_sum / num_tokens
    loss.backward()
    name = f"tbptt_n{free}_k{backprop}"
    assert_close(loss.detach(), arrays[f"{name}_loss"].to(loss.dtype), LOSS)

    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = target_for_export(model.config).export_tensors(model.config, own)
    del gradients["freqs_cis"]
    prefix = f"{name}_gradnorm/"
    norms = {key.removeprefix(prefix): x for key, x in arrays.items() if key.startswith(prefix)}
    assert gradients.keys() == norms.keys() and len(norms) == 39
    for key, norm in norms.items():
        torch.testing.assert_close(gradients[key].norm().double(), norm.double(), rtol=5e-5, atol=0)
    if (free, backprop) == (4, 4):
        expected = load_file(GOLDEN / "a_121_grads_n4_k4.safetensors")
        assert gradients.keys() == expected.keys()
        for key, gradient in expected.items():
            assert_close(gradients[key], gradient, 1e-4 * float(gradient.abs().max()))
