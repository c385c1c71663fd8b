"""Which class a model goes to, what is refused by name, what older files may look like."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion.tiny_models import (
    ATTENTION,
    LAYERED,
    MAMBA2,
    NOPE,
    SWIGLU,
    change_mixers,
    layered_config,
    random_model,
)
from conversion.with_transformers import assert_same_as_transformers, greedy, some_ids
from safetensors.torch import load_file, save_file

from megarec.config.mixer import MixerConfig
from megarec.conversion import export_hf, import_hf
from megarec.conversion.layers import LayeredTarget, mixer_shape
from megarec.conversion.target import Target, target_for_export, target_for_import
from megarec.errors import UserError


@pytest.mark.parametrize("name", LAYERED)
def test_the_special_class_wins(name: str) -> None:
    assert target_for_export(layered_config(name)).model_type == name


@pytest.mark.parametrize(
    ("name", "model_type", "architecture"),
    [
        ("mamba2", "nemotron_h", "NemotronHForCausalLM"),
        ("llama", "mistral", "MistralForCausalLM"),
        ("llama", "granitemoehybrid", "GraniteMoeHybridForCausalLM"),
    ],
)
def test_another_class_can_be_chosen(
    tmp_path: Path, name: str, model_type: str, architecture: str
) -> None:
    model = random_model(layered_config(name))
    export_hf(model, tmp_path / "out", model_type=model_type)
    assert_same_as_transformers(model, tmp_path / "out", architecture)


ALONE = (
    "import json, sys; sys.modules['megarec'] = None\n"
    + """
import torch
from transformers import AutoModelForCausalLM

prompt = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    print(json.dumps([type(model).__name__, ids.tolist()]))
"""
)


def test_exports_load_without_megarec(tmp_path: Path) -> None:
    expected = []
    names = {
        "nemotron_h": "NemotronHForCausalLM",
        "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    }
    for name, architecture in names.items():
        model = random_model(layered_config(name))
        export_hf(model, tmp_path / name)
        with torch.no_grad():
            expected.append([architecture, greedy(model, some_ids(), 8).tolist()])
    arguments = [json.dumps(some_ids().tolist()), *(str(tmp_path / name) for name in names)]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


def test_every_field_of_a_mixer_has_its_place() -> None:
    MixerConfig.discover()
    target_for_import("llama", "")
    layered = [t for t in Target.members.values() if issubclass(t, LayeredTarget)]
    assert len(layered) == len(LAYERED)
    smallest = {"mamba2": {"num_heads": 2}, "attention": {"num_heads": 2, "qk_norm": True}}
    for target in layered:
        assert target.mixers.keys() == target.keys.keys() == target.fixed.keys()
        for kind, keys in target.keys.items():
            mixer = MixerConfig.members[kind].model_validate(smallest[kind])
            # The norm of attention is refused, and RoPE is several keys.
            placed = keys.keys() | target.fixed[kind] | {"rope", "norm_eps"}
            assert mixer_shape(mixer, 64).keys() <= placed, (target, kind)


ROPE = {"scaling": {"type": "linear", "factor": 2.0}}
M, A, S = {"mixer": MAMBA2}, {"mixer": ATTENTION}, {"ffn": SWIGLU}
MANY = {
    "nemotron_h": (
        {"blocks": {"a": A | S, "s": S, "m": {"mixer": MAMBA2 | {"dt_limit": [0.0, 0.1]}}}},
        [
            "blocks.a.mixer and ffn: a layer of the architecture is mixer or ffn",
            "blocks.a.ffn.type=swiglu: the architecture has squared_relu, gelu only",
            'blocks.a.mixer.rope={"base":10000.0,"interleaved":false,"fraction":1.0,'
            '"scaling":null}: the architecture has null only',
            "blocks.s.ffn.type=swiglu: the architecture has squared_relu, gelu only",
            "blocks.m.mixer.dt_limit=(0.0, 0.1): the architecture has (0.0, inf) only",
            "head.soft_cap=30.0: the architecture does not cap its logits",
            "embedding_scale=2.0: the architecture has no such factor",
        ],
    ),
    "granitemoehybrid": (
        {
            "blocks": {
                "a": {"mixer": ATTENTION | {"window": 8, "qk_norm": True}} | S,
                "s": S,
                "m": {"mixer": MAMBA2 | {"num_heads": 10, "norm_eps": 1e-3}} | S,
            }
        },
        [
            "blocks.a.mixer.window=8: the architecture has null only",
            "blocks.a.mixer.qk_norm=True: the architecture has False only",
            "blocks.s.ffn: a layer of the architecture is mixer and ffn",
            "blocks.m.mixer.norm_eps=0.001 differs from norm.eps=0.01: the architecture has one "
            "for both",
            "blocks.m.mixer.num_heads=10 x head_dim=8: the architecture demands a multiple of "
            "d_model=64",
            "head.soft_cap=30.0: the architecture does not cap its logits",
        ],
    ),
    "mistral": (
        {
            "blocks": {
                "a": {"mixer": NOPE} | S,
                "s": {"mixer": ATTENTION | {"rope": ROPE | {"fraction": 0.5}, "scale": 1.0}},
                "m": M | S,
            }
        },
        [
            "blocks.a.mixer.rope=null: the architecture always has positions",
            "blocks.s.mixer: a layer of the architecture is mixer and ffn",
            "blocks.s.mixer.scale=1.0: the architecture has null only",
            "blocks.s.mixer.rope.fraction=0.5: the architecture turns all of a head",
            "blocks.m.mixer.type=mamba2: the architecture has attention only",
            "head.soft_cap=30.0: the architecture does not cap its logits",
            "embedding_scale=2.0: the architecture has no such factor",
        ],
    ),
}


@pytest.mark.parametrize("name", MANY)
def test_everything_that_a_class_lacks_is_named(name: str) -> None:
    changes, problems = MANY[name]
    config = layered_config(
        name, pattern="asm", head={"soft_cap": 30.0}, embedding_scale=2.0, **changes
    )
    with pytest.raises(UserError) as caught:
        target_for_export(config, name)
    assert [line.removeprefix(f"export to {name}: ") for line in caught.value.lines] == problems


def test_heads_that_do_not_divide_are_no_llama() -> None:
    config = change_mixers("llama", num_heads=3, num_kv_heads=1, head_dim=10)
    with pytest.raises(UserError, match="num_heads=3: the architecture demands a divisor"):
        target_for_export(config, "llama")


@pytest.mark.parametrize(
    ("name", "other", "differing"),
    [
        ("granitemoehybrid", {"mixer": NOPE | {"rope": {}}} | S, "attention.rope"),
        ("granitemoehybrid", {"mixer": MAMBA2 | {"state_dim": 8}} | S, "mamba2.state_dim"),
        ("granitemoehybrid", M | {"ffn": {"d_ff": 49}}, "ffn.d_ff"),
        ("granitemoehybrid", M | S | {"residual_scale": 0.6}, "residual_scale"),
        ("nemotron_h", {"ffn": {"type": "gelu", "d_ff": 40}}, "ffn.type"),
        ("mistral", {"mixer": ATTENTION | {"head_dim": 12}} | S, "attention.window"),
    ],
)
def test_layers_of_several_shapes_are_refused(
    name: str, other: dict[str, Any], differing: str
) -> None:
    blocks = LAYERED[name]["blocks"]
    config = layered_config(
        name, blocks=blocks | {"x": other}, pattern=LAYERED[name]["pattern"] + "x"
    )
    with pytest.raises(UserError, match=rf"blocks .*, x differ in .*{differing}"):
        target_for_export(config, name)


GRANITE = {"num_local_experts": 0}
UNKNOWN: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        "hybrid_override_pattern": "MEM*",
        "mlp_hidden_act": "silu",
        "mamba_hidden_act": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
        "use_bias": True,
        "mamba_proj_bias": True,
        "sliding_window": 128,
        "time_step_limit": [0.0, 0.1],
        "num_nextn_predict_layers": 1,
    },
    "granitemoehybrid": {
        "num_local_experts": 8,
        "hidden_act": "gelu",
        "attention_bias": True,
        "mamba_proj_bias": True,
        "position_embedding_type": "alibi",
        "layer_types": ["mamba", "mlp"],
        "logits_scaling": 0.0,
    },
    "mamba2": {"hidden_act": "gelu", "use_bias": True, "rms_norm": False, "n_groups": 0},
    "llama": {"hidden_act": "gelu", "attention_bias": True, "mlp_bias": True},
    "mistral": {"hidden_act": "relu", "sliding_window": 0, "layer_types": ["full_attention"]},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_every_unknown_option_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name} | UNKNOWN[name]))
    with pytest.raises(UserError) as caught:
        import_hf(tmp_path)
    assert len(caught.value.lines) == len(UNKNOWN[name])
    for key, value in UNKNOWN[name].items():
        assert any(f"config.json: {key}={value!r}: " in line for line in caught.value.lines), key


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_scaling": {"type": "yarn", "mscale": 0.7}}, "mscale=0.7"),
        ("llama", {"rope_scaling": {"type": "yarn", "truncate": False}}, "truncate=False"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope.scaling.factor: Field required"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}},
            "rope_parameters of full_attention, sliding_attention: expected one for all layers",
        ),
        ("granitemoehybrid", {}, "num_local_experts: Field required"),
        (
            "granitemoehybrid",
            GRANITE | {"num_hidden_layers": 3, "layer_types": ["mamba"]},
            "num_hidden_layers=3, but layer_types lists 1",
        ),
        (
            "granitemoehybrid",
            GRANITE | {"layer_types": ["mamba"], "layers_block_type": ["attention"]},
            "layer_types=.* and layers_block_type=.* differ",
        ),
        ("granitemoehybrid", GRANITE | {"mamba_n_groups": 3}, "num_groups=3 does not divide"),
        ("nemotron_h", {}, "layers_block_type and hybrid_override_pattern are both missing"),
        (
            "nemotron_h",
            {"layers_block_type": ["mamba", "mlp"], "hybrid_override_pattern": "M*"},
            "layers_block_type and hybrid_override_pattern differ",
        ),
        ("nemotron_h", {"layers_block_type": ["mamba", "moe"]}, "unknown layers moe; known"),
        ("nemotron_h", {"layers_block_type": 3}, "layers_block_type=3"),
    ],
)
def test_bad_config(tmp_path: Path, name: str, keys: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name} | keys))
    with pytest.raises(UserError, match=message):
        import_hf(tmp_path)


def rename_tensors(folder: Path, changes: dict[str, str]) -> None:
    """Replace the beginnings of names in an export."""
    tensors = load_file(folder / "model.safetensors")
    for old, new in changes.items():
        tensors = {
            new + name.removeprefix(old) if name.startswith(old) else name: tensor
            for name, tensor in tensors.items()
        }
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("nemotron_h", {"backbone.": "model."}),
        ("mamba2", {"backbone.embeddings.": "backbone.embedding."}),
    ],
)
def test_names_of_older_files(tmp_path: Path, name: str, renamed: dict[str, str]) -> None:
    export_hf(random_model(layered_config(name)), tmp_path / "out")
    expected = import_hf(tmp_path / "out")[1]
    rename_tensors(tmp_path / "out", renamed)
    tensors = import_hf(tmp_path / "out")[1]
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_superfluous_tensors_of_older_files(tmp_path: Path) -> None:
    model = random_model(layered_config("llama", head={"tie_embeddings": True}))
    export_hf(model, tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    assert import_hf(tmp_path / "out")[1].keys() == model.state_dict().keys()
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, path)
    with pytest.raises(UserError, match="lm_head.weight: not in this model"):
        import_hf(tmp_path / "out")


def test_the_released_size_of_nemotron_h(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoModelForCausalLM, NemotronHConfig

    pattern = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
    released = {"hybrid_override_pattern": pattern, "vocab_size": 131072, "hidden_size": 4096}
    config = target_for_import("nemotron_h", "").import_config(released)
    assert "clamps step sizes to at least time_step_min=0.001" in caplog.text
    assert config.layers.count(config.blocks["*"]) == 4
    target = target_for_export(config)
    hf = target.export_config(config)
    assert hf["hybrid_override_pattern"] == pattern and hf["time_step_min"] == 1e-12
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(NemotronHConfig(**hf))
    assert config.num_params() == sum(p.numel() for p in theirs.parameters())
    names = {name.replace("backbone.", "model.") for name in target.names(config).values()}
    assert names == theirs.state_dict().keys()


def test_infinity_is_written_as_json(tmp_path: Path) -> None:
    export_hf(random_model(layered_config("mamba2")), tmp_path / "out")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (tmp_path / "out/config.json").read_text()
    hf = json.loads(text, parse_constant=refuse)
    assert hf["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    # Older versions of transformers wrote what JSON does not have.
    plain = json.dumps(hf | {"time_step_limit": [0.0, float("inf")]})
    expected = import_hf(tmp_path / "out")[0]
    (tmp_path / "out/config.json").write_text(plain)
    assert import_hf(tmp_path / "out")[0] == expected
