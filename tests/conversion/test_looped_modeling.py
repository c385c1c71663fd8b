"""Exports of looped stacks with a modeling file: transformers computes the same, cached or not."""

import copy
import re
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from conversion.own_exports import LONGEST, PROMPTS, edited, load_trusted, padded
from conversion.tiny_models import assert_same_weights, random_model
from conversion.with_transformers import (
    assert_same_as_transformers,
    cached_logits,
    generate,
    some_ids,
)

import megarec.generation
from megarec.config.loader import load_config
from megarec.config.model import ModelConfig
from megarec.config.stack import UpdateConfig
from megarec.conversion import export_hf, import_hf, load_model
from megarec.conversion.target import target_for_export
from megarec.data.tokenizer import load_tokenizer
from megarec.errors import UserError
from megarec.models import Backbone
from megarec.models.context import Context
from megarec.models.halting import Halting

MODEL_TYPE = "megarec_looped"
ARCHITECTURE = "LoopedForCausalLM"
FILE = "modeling_looped.py"
EPS = 0.01
ATTENTION = {"type": "attention", "num_heads": 4, "norm_eps": EPS, "max_seq_len": 64}
MLSTM = {"type": "mlstm", "num_heads": 2, "norm_eps": 0.02, "chunk_size": 8}


def looped_config(blocks: dict[str, Any], pattern: str, **changes: Any) -> ModelConfig:
    """A model section of 32 channels; keys of `changes` replace those of the top level."""
    stack = {"type": "looped", "num_recurrences": 3} | changes.pop("stack")
    tree = {"vocab_size": 257, "d_model": 32, "norm": {"eps": EPS}} | changes
    return ModelConfig.model_validate(
        tree | {"num_layers": len(pattern), "blocks": blocks, "pattern": pattern, "stack": stack}
    )


CASES = {
    "mixed": looped_config(
        {
            "a": {
                "mixer": ATTENTION
                | {"num_kv_heads": 2, "qk_bias": True, "rope": {"interleaved": True, "base": 50.0}},
                "ffn": {"d_ff": 48},
                "norm_placement": "sandwich",
            },
            "m": {
                "mixer": MLSTM,
                "ffn": {"type": "squared_relu", "d_ff": 24},
                "norm_placement": "peri",
                "learned_skip": True,
                "residual_scale": 0.7,
                "layer_scale": 0.5,
            },
            "f": {"ffn": {"type": "gelu", "d_ff": 24}, "norm_placement": "post"},
        },
        "amafm",
        stack={"prelude": 1, "core": 3, "coda": 1, "norm_core_output": True, "initial_std": 2.0},
        embedding_scale=3.0,
        head={"tie_embeddings": True, "logit_scale": 2.0, "soft_cap": 5.0},
    ),
    "euler, added to zero": looped_config(
        {
            "a": {
                "mixer": ATTENTION
                | {"head_dim": 12, "window": 4, "scale": 0.3, "rope": {"fraction": 0.5}}
            },
            "m": {"mixer": MLSTM | {"qk_dim_factor": 1.0, "v_dim_factor": 0.5}},
        },
        "am",
        stack={
            "core": 2,
            "inject": "add",
            "initial_state": "zero",
            "update": {"type": "euler", "dt": 0.3},
            "num_recurrences": 4,
        },
    ),
    "gated, a vector a step": looped_config(
        {"a": {"mixer": ATTENTION | {"qk_norm": True}, "ffn": {"d_ff": 24}, "layer_scale": 0.3}},
        "aa",
        stack={
            "core": 1,
            "coda": 1,
            "inject": "none",
            "initial_state": "embedding",
            "step_signal": "learned",
            "num_step_embeddings": 2,
            "update": {"type": "gated"},
        },
    ),
    "universal": looped_config(
        {
            "a": {
                "mixer": ATTENTION | {"rope": None},
                "ffn": {"type": "gelu", "d_ff": 48},
                "norm_placement": "post",
            }
        },
        "a",
        stack={
            "core": 1,
            "inject": "none",
            "initial_state": "embedding",
            "step_signal": "sinusoid",
            "num_recurrences": 6,
            "halt": {"type": "act", "bias": -3.0, "eps": 0.2},
        },
        embedding_scale=5.0,
    ),
    "exit gate": looped_config(
        {"a": {"mixer": ATTENTION, "ffn": {"d_ff": 24}, "norm_placement": "peri"}},
        "aa",
        stack={
            "core": 2,
            "inject": "none",
            "initial_state": "embedding",
            "update": {"type": "normed", "eps": 0.03},
            "num_recurrences": 6,
            "halt": {"type": "exit_gate", "threshold": 0.8},
        },
        embedding_scale=5.0,
    ),
}


@pytest.fixture(scope="module")
def model() -> Backbone:
    return random_model(CASES["mixed"])


@pytest.fixture(scope="module")
def export(model: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tiny"
    export_hf(model, folder, load_tokenizer("byte"))
    return folder


@pytest.fixture(scope="module")
def theirs(export: Path) -> Any:
    return load_trusted(export)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_transformers_computes_the_same_and_back(tmp_path: Path, case: str) -> None:
    model, ids = random_model(CASES[case]), some_ids()
    export_hf(model, tmp_path / "out")
    theirs = assert_same_as_transformers(
        model, tmp_path / "out", ARCHITECTURE, trust_remote_code=True
    )
    torch.testing.assert_close(cached_logits(theirs, ids, 2), model(ids), rtol=0, atol=1e-4)
    for steps in (1, 2, 5):
        logits = theirs(ids, num_steps=steps).logits
        torch.testing.assert_close(logits, model(ids, num_recurrences=steps), rtol=0, atol=1e-4)
        # Tokens that halt may need no more than 5.
        assert steps == 5 or (logits - model(ids)).abs().max() > 1e-2
    assert {name: p.shape for name, p in theirs.named_parameters() if "stack" in name} == {
        name: p.shape for name, p in model.named_parameters() if "stack" in name
    }
    imported, _ = load_model(tmp_path / "out")
    assert imported.config == model.config
    assert_same_weights(imported, model)


@pytest.mark.parametrize("case", ["universal", "exit gate"])
@torch.no_grad()
def test_tokens_stop_at_different_steps(case: str) -> None:
    """So that the comparison above means something."""
    model, counted = random_model(CASES[case]), []
    for length in range(1, 22):
        halting = Halting()
        model(some_ids()[:1, :length], ctx=Context(halting=halting))
        counted.append(halting.num_steps)
    steps = [after - before for before, after in zip([0, *counted], counted, strict=False)]
    assert len(set(steps)) >= 3 and max(steps) <= 6


@torch.no_grad()
def test_padding_changes_nothing(model: Backbone, theirs: Any) -> None:
    for left in (True, False):
        ids, mask = padded(left)
        logits = theirs(ids, attention_mask=mask).logits
        for row, prompt in enumerate(PROMPTS):
            alone = model(torch.tensor([prompt]))[0]
            torch.testing.assert_close(logits[row, mask[row] == 1], alone, rtol=0, atol=1e-4)
    # Padding between cached tokens and new ones, too.
    outputs = theirs(ids, attention_mask=mask, use_cache=True)
    more = torch.tensor([[3, 8, 9]] * 3)
    mask = torch.cat([mask, torch.tensor([[0, 1, 1]] * 3)], 1)
    after = theirs(more, attention_mask=mask, past_key_values=outputs.past_key_values)
    for row, prompt in enumerate(PROMPTS):
        alone = model(torch.tensor([[*prompt, 8, 9]]))[0, -1]
        torch.testing.assert_close(after.logits[row, -1], alone, rtol=0, atol=1e-4)
    message = re.escape("got shape (3, 2), expected (3, 3 or more)")
    with pytest.raises(ValueError, match=message):
        theirs(more, attention_mask=mask[:, :2])


def test_generation_is_ours(model: Backbone, theirs: Any) -> None:
    ids, mask = padded(left=True)
    expected = megarec.generation.generate(model, PROMPTS, max_new_tokens=8)
    for use_cache in (True, False):
        new = generate(theirs, ids, attention_mask=mask, use_cache=use_cache)
        assert new[:, LONGEST:].tolist() == expected
    for options in ({"num_beams": 3}, {"num_steps": 5}):
        results = [
            generate(theirs, ids, attention_mask=mask, use_cache=use_cache, **options).tolist()
            for use_cache in (True, False)
        ]
        assert results[0] == results[1] != new.tolist()


@torch.no_grad()
def test_a_cache_goes_on_at_its_depth(theirs: Any) -> None:
    ids = some_ids()
    cache = theirs(ids[:, :9], use_cache=True, num_steps=4).past_key_values
    whole = theirs(ids, num_steps=4).logits[:, 9:]
    for past in (copy.deepcopy(cache), cache):
        again = theirs(ids[:, 9:], past_key_values=past, num_steps=4).logits
        torch.testing.assert_close(again, whole, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="num_steps: got 3, expected 4, as in the cache"):
        theirs(ids[:, 9:], past_key_values=cache)
    with pytest.raises(ValueError, match="num_steps: got 0, expected at least 1"):
        theirs(ids, num_steps=0)
    outputs = theirs(ids, use_cache=False, return_dict=False, logits_to_keep=1)
    assert len(outputs) == 1 and outputs[0].shape == (2, 1, 257)


def test_loss_and_gradient_are_ours(model: Backbone, theirs: Any) -> None:
    ids = some_ids()
    labels = ids.clone()
    labels[0, 4:9] = -100
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    loss_sum, num_tokens = model(ids, labels=shifted)
    loss = theirs(ids, labels=labels).loss
    torch.testing.assert_close(loss, loss_sum / num_tokens, rtol=1e-5, atol=0)
    loss.backward()
    (loss_sum / num_tokens).backward()
    names = target_for_export(model.config).names(model.config)
    own = {names[name]: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name], rtol=1e-4, atol=1e-5)
    model.zero_grad()
    theirs.zero_grad()


@torch.no_grad()
def test_bfloat16_keeps_the_gates_in_float32(model: Backbone, export: Path) -> None:
    theirs = load_trusted(export, dtype=torch.bfloat16)
    half = copy.deepcopy(model).bfloat16()
    for name, parameter in half.named_parameters():
        if ".gates." in name:
            parameter.data = model.get_parameter(name).data
    names = target_for_export(model.config).names(model.config)
    found = dict(theirs.named_parameters())
    for name, expected in half.named_parameters():
        parameter = found[names[name]]
        assert parameter.dtype == expected.dtype and torch.equal(parameter, expected), name
    ids = some_ids()
    exact, rounded = model(ids), half(ids)
    # Two orders of rounding differ by no more than one of them from the exact result.
    assert (theirs(ids).logits - rounded).abs().mean() < 1.5 * (rounded - exact).abs().mean()
    assert generate(theirs, ids, attention_mask=torch.ones_like(ids)).shape == (2, 29)
    assert theirs.bfloat16()(ids).logits.isfinite().all()


def test_transformers_can_save_it_again(model: Backbone, theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "again")
    imported, _ = load_model(tmp_path / "again")
    assert imported.config == model.config
    assert_same_weights(imported, model)
    assert_same_as_transformers(model, tmp_path / "again", ARCHITECTURE, trust_remote_code=True)


def stack_with(**changes: Any) -> dict[str, Any]:
    return CASES["mixed"].stack.model_dump(mode="json") | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stack": None}, f"stack=sequential: {FILE} has looped only"),
        ({"stack": {"type": "spiral"}}, "unknown stack type 'spiral'"),
        ({"stack": stack_with(core=4)}, "prelude=1 + core=4 + coda=1 = 6; expected num_layers=5"),
        ({"stack": stack_with(inject="dot")}, "stack.inject='dot'"),
        ({"stack": stack_with(halt={"type": "never"})}, "unknown halting rule type 'never'"),
        ({"blocks": None}, "blocks: Field required"),
        (
            {"stack": stack_with(halt={"type": "kl", "threshold": 0.1})},
            f"stack.halt.type=kl: {FILE} has act, exit_gate only",
        ),
    ],
)
def test_edits_of_the_config_are_refused_by_name(
    export: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        import_hf(edited(export, tmp_path / "edited", **changes))
    assert all(str(tmp_path / "edited") in line for line in caught.value.lines)


def test_what_the_modeling_file_lacks_is_named(tmp_path: Path) -> None:
    scaling = {"scaling": {"type": "linear", "factor": 2.0}}
    mamba2 = {"type": "mamba2", "num_heads": 4, "head_dim": 16, "state_dim": 8}
    with patch.dict(UpdateConfig.members):

        class OtherConfig(UpdateConfig):
            type: Literal["other"] = "other"

            def build(self, d_model: int) -> Any:
                raise NotImplementedError

        config = looped_config(
            {"a": {"mixer": ATTENTION | {"rope": scaling}}, "m": {"mixer": mamba2}},
            "am",
            stack={"core": 2, "update": {"type": "other"}, "halt": {"type": "argmax"}},
        )
    with pytest.raises(UserError) as caught:
        target_for_export(config, MODEL_TYPE)
    assert list(caught.value.lines) == [
        f"export to {MODEL_TYPE}: {line}"
        for line in (
            f"blocks.m.mixer.type=mamba2: {FILE} has attention, mlstm only",
            f"blocks.a.mixer.rope.scaling.type=linear: {FILE} has RoPE without scaling only",
            f"stack.update.type=other: {FILE} has euler, gated, normed only",
            f"stack.halt.type=argmax: {FILE} has act, exit_gate only",
        )
    ]


def test_only_targets_with_the_stack_are_asked() -> None:
    scaled = ATTENTION | {"rope": {"scaling": {"type": "linear", "factor": 2.0}}}
    config = looped_config({"a": {"mixer": scaled}}, "aa", stack={"core": 2})
    sequential = config.model_dump(mode="json") | {"stack": {"type": "sequential"}, "head": {}}
    sequential["blocks"]["a"]["residual_scale"] = 0.5
    for model, found in (
        (config, {"huginn_raven", MODEL_TYPE}),
        (ModelConfig.model_validate(sequential), {"llama", "granitemoehybrid", "nemotron_h"}),
    ):
        with pytest.raises(UserError) as caught:
            target_for_export(model)
        asked = {line.removeprefix("export to ").partition(":")[0] for line in caught.value.lines}
        assert found <= asked and not asked & ({"huginn_raven", MODEL_TYPE, "llama"} - found)


@pytest.mark.parametrize(
    ("recipe", "model_type"),
    [
        ("quickstart_looped", "huginn_raven"),
        ("tiny/looped", "huginn_raven"),
        ("tiny/looped_mlstm", MODEL_TYPE),
        ("tiny/universal", MODEL_TYPE),
        ("tiny/score", MODEL_TYPE),
        ("tiny/gated", MODEL_TYPE),
        ("tiny/looplm", MODEL_TYPE),
    ],
)
def test_which_layout_recipes_have(recipe: str, model_type: str) -> None:
    assert target_for_export(load_config(f"{recipe}.yaml").model).model_type == model_type


def test_readme_tells_of_depth_and_shows_how_to_load(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (export / "README.md").read_text()
    assert f"`trust_remote_code=True` runs `{FILE}`" in text and "pad them on the left" in text
    assert "iterates 3 times; `model(..., num_steps=n)`" in text and "trains slowly" in text
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(export)
    scope: dict[str, Any] = {}
    exec(code.replace("=100", "=4, num_steps=2"), scope)
    assert type(scope["model"]).__name__ == ARCHITECTURE
    assert "Once upon a time" in capsys.readouterr().out
