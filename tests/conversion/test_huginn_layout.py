"""Huginn's released layout: what is read, written and checked, and what is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion.huginn_files import WEIGHTS, change_tensors, golden_tensors, released
from conversion.tiny_models import assert_same_weights, random_model
from safetensors.torch import load_file, save_file

from megarec.config.loader import load_config, read_yaml
from megarec.config.model import ModelConfig
from megarec.conversion import export_hf, import_hf, load_model
from megarec.conversion.target import target_for_export, target_for_import
from megarec.errors import UserError

MODEL_TYPE = "huginn_raven"
ATTENTION = {
    "type": "attention",
    "num_heads": 4,
    "qk_bias": True,
    "rope": {"base": 5e4, "interleaved": True},
    "max_seq_len": 64,
}
BLOCK = {"mixer": ATTENTION, "ffn": {"d_ff": 48}, "norm_placement": "sandwich"}
STACK = {
    "type": "looped",
    "prelude": 1,
    "core": 2,
    "coda": 1,
    "norm_core_output": True,
    "num_recurrences": 3,
}


def huginn_config(stack: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """A model section of 32 channels; keys of `stack` and of the top level are replaced."""
    tree = {
        "vocab_size": 257,
        "d_model": 32,
        "blocks": {"b": BLOCK},
        "pattern": ["b"],
        "stack": STACK | (stack or {}),
        "embedding_scale": 32**0.5,
        "head": {"tie_embeddings": True},
        "norm": {"eps": 0.01},
    }
    tree |= changes
    parts = ("prelude", "core", "coda")
    tree["num_layers"] = sum(tree["stack"].get(part, 1) for part in parts)
    return ModelConfig.model_validate(tree)


def test_the_release_comes_back_as_it_was(tmp_path: Path) -> None:
    model, _ = load_model(released(tmp_path / "in"))
    export_hf(model, tmp_path / "out")
    theirs, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("in", "out"))
    assert ours.keys() == theirs.keys() and len(ours) == 40
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape and ours[name].dtype == tensor.dtype
        assert name == "freqs_cis" or torch.equal(ours[name], tensor)
    torch.testing.assert_close(ours["freqs_cis"], theirs["freqs_cis"], rtol=0, atol=1e-6)
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "out"))
    assert {key for key in old if new.get(key) != old[key]} == {"auto_map"}
    assert new["auto_map"]["AutoModelForCausalLM"] == "modeling_huginn.RavenForCausalLM"


@pytest.mark.parametrize(
    "changes",
    [
        {"stack": {"backprop": 2, "depth": {"type": "lognormal_poisson", "mean": 3}}},
        {"head": {}, "stack": {"prelude": 0, "coda": 2}},
        {"blocks": {"b": BLOCK | {"mixer": ATTENTION | {"qk_bias": False}}}},
        {"stack": {"core": 1, "coda": 0, "backprop": 1}},
    ],
)
def test_own_round_trip_is_bitwise(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = random_model(huginn_config(**changes))
    assert target_for_export(model.config).model_type == MODEL_TYPE
    export_hf(model, tmp_path / "out")
    imported, _ = load_model(tmp_path / "out")
    assert_same_weights(imported, model)
    ours, theirs = model.config.stack, imported.config.stack
    assert theirs.backprop == ours.backprop
    assert (theirs.depth is None) == (ours.depth is None)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(imported(ids), model(ids))


def test_untied_heads_are_written(tmp_path: Path) -> None:
    for tied in (True, False):
        model = random_model(huginn_config(head={"tie_embeddings": tied}))
        export_hf(model, tmp_path / str(tied))
        assert ("lm_head.weight" in load_file(tmp_path / str(tied) / WEIGHTS)) is not tied


def test_a_tied_head_that_is_there_twice(tmp_path: Path) -> None:
    embedding = golden_tensors()["transformer.wte.weight"]
    folder = change_tensors(released(tmp_path / "in"), **{"lm_head.weight": embedding.clone()})
    assert "head.weight" not in import_hf(folder)[1]
    change_tensors(folder, **{"lm_head.weight": embedding + 1})
    with pytest.raises(UserError, match="lm_head.weight: not in this model"):
        import_hf(folder)


def test_bfloat16_keeps_the_table_exact(tmp_path: Path) -> None:
    model = random_model(huginn_config()).bfloat16()
    export_hf(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert tensors["freqs_cis"].dtype == torch.float32
    config = json.loads((tmp_path / "out/config.json").read_text())
    # The released code reads the older name.
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    imported = import_hf(tmp_path / "out")[1]
    assert all(torch.equal(imported[name], x) for name, x in model.state_dict().items())


def test_names_of_the_training_code(tmp_path: Path) -> None:
    expected = import_hf(released(tmp_path / "in"))[1]
    prefixed = {f"_orig_mod._original_module.{k}": x for k, x in golden_tensors().items()}
    save_file(prefixed, tmp_path / "in" / WEIGHTS)
    tensors = import_hf(tmp_path / "in")[1]
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], x) for name, x in expected.items())


def test_keys_of_the_released_config(tmp_path: Path) -> None:
    expected = import_hf(released(tmp_path / "plain"))[0]
    more = {
        "n_heads": None,
        "num_attention_heads": 4,
        "head_dim": 16,
        "padded_vocab_size": 128,
        "vocab_size": 120,
        "effective_expected_depth": 18,
        "init_orthogonal": False,
        "init_values": {"embed_scale": 8.0, "std": 0.0790569, "out_proj": 0.0132, "embedding": 1.0},
        "test_time_noise": 0,
        "transformers_version": "4.47.1",
    }
    assert import_hf(released(tmp_path / "released", **more))[0] == expected


def test_the_published_model_is_the_recipe() -> None:
    recipe = load_config("huginn_3.5b.yaml").model
    target = target_for_export(recipe)
    hf = json.loads(json.dumps(target.export_config(recipe)))
    assert target.model_type == MODEL_TYPE
    assert target.import_config(hf) == recipe
    # The release's values are the defaults.
    assert target.import_config({"model_type": MODEL_TYPE}) == recipe
    expected = {"n_embd": 5280, "n_heads": 55, "vocab_size": 65536, "padding_multiple": 4096}
    expected |= {"init_strategy": "takase", "sampling_scheme": "poisson-lognormal-filling"}
    assert {key: hf[key] for key in expected} == expected


def test_another_beginning_is_not_called_takase() -> None:
    target = target_for_import(MODEL_TYPE, "")
    hf = target.export_config(huginn_config())
    assert "init_strategy" not in hf and hf["sampling_scheme"] == "fixed"
    depth = {"type": "lognormal_poisson", "mean": 4}
    assert target.export_config(huginn_config({"depth": depth}))["sampling_scheme"] == "fixed"


def test_another_cache_is_told_of() -> None:
    target = target_for_import(MODEL_TYPE, "")
    told = target.notes(huginn_config({"cache": {"type": "modulo", "slots": 1}}))
    assert told[:-1] == target.notes(huginn_config()) and "`cache: modulo`" in told[-1]


def test_the_contract_covers_it() -> None:
    case = Path(__file__).parents[1] / "contract/cases/models/looped_huginn.yaml"
    config = ModelConfig.model_validate(read_yaml(case))
    assert target_for_export(config).model_type == MODEL_TYPE


def test_a_missing_table_is_no_loss(tmp_path: Path) -> None:
    folder = change_tensors(released(tmp_path / "in"), freqs_cis=None)
    assert len(import_hf(folder)[1]) == len(import_hf(released(tmp_path / "whole"))[1])


def test_a_wrong_table_is_refused(tmp_path: Path) -> None:
    message = "in: freqs_cis: .* values differ from cos and sin of position .* 10000"
    with pytest.raises(UserError, match=message):
        import_hf(released(tmp_path / "in", rope_base=10_000))
    folder, table = released(tmp_path / "in"), golden_tensors()["freqs_cis"]
    for wrong in (table.flip(-1), table.index_fill(1, torch.tensor([63]), float("nan"))):
        with pytest.raises(UserError, match="the table is of another RoPE"):
            import_hf(change_tensors(folder, freqs_cis=wrong))
    message = "freqs_cis: shape [1, 32, 1, 8, 2], expected [1, 64, 1, 8, 2] of 64 positions"
    with pytest.raises(UserError, match=re.escape(message)):
        import_hf(change_tensors(folder, freqs_cis=table[:, :32]))
    # Rounded, it is the same.
    import_hf(change_tensors(folder, freqs_cis=table.bfloat16()))


def test_the_table_of_the_published_length_is_told_from_others() -> None:
    from megarec.conversion.rope_table import check_rope_table, rope_table
    from megarec.models.rotary import RotaryConfig

    rope = RotaryConfig(base=5e4, interleaved=True)
    exact = rope.base ** -(torch.arange(0, 96, 2, dtype=torch.float64) / 96)
    angle = torch.arange(4096)[:, None, None] * exact
    table = torch.stack([angle.cos(), angle.sin()], -1)[None]
    check_rope_table("table", table, rope, 96, 4096)
    check_rope_table("table", rope_table(rope, 96, 4096), rope, 96, 4096)
    for other in (
        rope.model_copy(update={"base": 50_500.0}),
        rope.model_copy(update={"base": 1e4}),
    ):
        with pytest.raises(UserError, match="values differ"):
            check_rope_table("table", rope_table(other, 96, 4096), rope, 96, 4096)


UNKNOWN: dict[str, Any] = {
    "bias": True,
    "architecture_class_name": "GPT",
    "block_class_name": "TransformerPreNormBlock",
    "mlp_class_name": "BaseMLP",
    "nonlin_name": "ReLU",
    "norm_class_name": "LayerNorm",
    "injection_type": "add",
    "n_layers_in_recurrent_block": 0,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "sampling_scheme": "geometric",
    "state_init": "zero",
    "test_time_noise": 0.1,
}


def test_every_unknown_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        import_hf(released(tmp_path / "in", **UNKNOWN))
    assert len(caught.value.lines) == len(UNKNOWN)
    for key, value in UNKNOWN.items():
        assert any(f"config.json: {key}={value!r}: " in line for line in caught.value.lines), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": "four"}, "config.json: n_heads='four'"),
        ({"n_heads": 3, "num_key_value_heads": 3}, "num_heads=3 does not divide d_model=64"),
        ({"num_attention_heads": 8}, "n_heads=4 and num_attention_heads=8 differ"),
        ({"tie_word_embeddings": False}, "tie_embeddings=True and tie_word_embeddings=False"),
        ({"tie_embeddings": False}, "head.weight: missing"),
        ({"init_values": {"embed_scale": 1.0}}, "init_values: embed_scale=1.0: expected 8"),
        ({"init_values": {"std": 0.02}}, "init_values: std=0.02: expected 0.0790569415"),
        ({"qk_bias": False}, "transformer.prelude.0.attn.qk_bias: not in this model"),
        ({"n_layers_in_coda": 2}, "blocks.4.ffn_norm.weight: missing"),
    ],
)
def test_bad_configs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        import_hf(released(tmp_path / "in", **changes))


def problems_of(config: ModelConfig) -> list[str]:
    with pytest.raises(UserError) as caught:
        target_for_export(config, MODEL_TYPE)
    return [line.removeprefix(f"export to {MODEL_TYPE}: ") for line in caught.value.lines]


def test_everything_that_the_architecture_lacks_is_named() -> None:
    scaling = {"type": "linear", "factor": 2.0}
    blocks = {
        "a": BLOCK
        | {
            "mixer": ATTENTION
            | {"num_kv_heads": 2, "window": 8, "qk_norm": True, "scale": 1.0, "head_dim": 12}
            | {"rope": {"fraction": 0.5, "scaling": scaling}},
            "learned_skip": True,
            "layer_scale": 0.5,
            "norm_placement": "peri",
            "residual_scale": 0.5,
        },
        "n": {"mixer": ATTENTION | {"rope": None}, "norm_placement": "sandwich"},
        "m": {"mixer": {"type": "mlstm", "num_heads": 4}, "ffn": {"type": "gelu", "d_ff": 8}},
        "f": {"ffn": {"d_ff": 8}, "norm_placement": "sandwich"},
    }
    stack = {
        "inject": "add",
        "step_signal": "sinusoid",
        "update": {"type": "gated"},
        "initial_state": "zero",
        "initial_std": 1.0,
        "norm_core_output": False,
        "halt": {"type": "act"},
    }
    found = problems_of(
        huginn_config(
            stack,
            blocks=blocks,
            pattern="anmf",
            embedding_scale=1.0,
            head={"soft_cap": 30.0, "logit_scale": 2.0},
        )
    )
    only = "the architecture has"
    skip, scale = "adds to x as it is, without a weight a channel", "has no weight a channel there"
    linear = '{"type":"linear","factor":2.0}'
    for line in [
        f"blocks.a.learned_skip=true: the architecture {skip}",
        f"blocks.a.layer_scale=0.5: the architecture {scale}",
        f"blocks.a.norm_placement=peri: {only} sandwich only",
        f"blocks.a.mixer.num_kv_heads=2: {only} 4 only",
        f"blocks.a.mixer.window=8: {only} null only",
        f"blocks.a.mixer.qk_norm=True: {only} False only",
        f"blocks.a.mixer.scale=1.0: {only} null only",
        "blocks.a.mixer.num_heads=4 x head_dim=12: the architecture demands d_model=32",
        f"blocks.a.mixer.rope.interleaved=False: {only} True only",
        f"blocks.a.mixer.rope.fraction=0.5: {only} 1.0 only",
        f"blocks.a.mixer.rope.scaling={linear}: {only} null only",
        "blocks.n.ffn=null: every block of the architecture has one",
        "blocks.n.mixer.rope=null: the architecture always has positions",
        f"blocks.m.norm_placement=pre: {only} sandwich only",
        f"blocks.m.ffn.type=gelu: {only} swiglu only",
        f"blocks.m.mixer.type=mlstm: {only} attention only",
        "blocks.f.mixer=null: every block of the architecture has one",
        f"stack.inject=add: {only} concat only",
        f"stack.step_signal=sinusoid: {only} null only",
        f"stack.initial_state=zero: {only} random only",
        f"stack.norm_core_output=False: {only} True only",
        f"embedding_scale=1.0: {only} {32**0.5} only",
        f"stack.initial_std=1.0: {only} {0.4**0.5} only",
        "head.soft_cap=30.0: the architecture does not cap its logits",
        "head.logit_scale=2.0: the architecture has no such factor",
        "blocks.a.residual_scale=0.5: the architecture has no such factor",
    ]:
        assert line in found, line
        found.remove(line)
    update, halt = found
    assert update.startswith('stack.update={"type":"gated"') and update.endswith("null only")
    assert halt.startswith('stack.halt={"type":"act"') and halt.endswith("null only")


def test_layers_of_several_shapes_and_plain_stacks_are_refused() -> None:
    other = BLOCK | {"mixer": ATTENTION | {"num_heads": 2, "max_seq_len": 32}}
    assert problems_of(huginn_config(blocks={"b": BLOCK, "o": other}, pattern="bo")) == [
        "blocks b, o differ in attention.num_heads, attention.num_kv_heads, attention.head_dim, "
        "attention.max_seq_len: the architecture has one value for all layers"
    ]
    plain = huginn_config().model_copy(update={"stack": ModelConfig.model_fields["stack"].default})
    assert problems_of(plain) == ["stack=sequential: the architecture iterates its core"]
