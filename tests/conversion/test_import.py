"""Older layouts load; what megarec does not have, and what is damaged, is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarec.config.loader import load_config
from megarec.conversion import import_hf
from megarec.conversion.target import target_for_import
from megarec.errors import UserError


def write_folder(
    folder: Path, golden: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> Path:
    """Write the golden folder with changes; None removes an entry."""
    old_config = json.loads((golden / "config.json").read_text()) | config
    old_tensors = load_file(golden / "model.safetensors") | tensors
    folder.mkdir(exist_ok=True)
    kept = {key: value for key, value in old_config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    kept = {name: tensor.contiguous() for name, tensor in old_tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


def assert_same_model(folder: Path, golden: Path) -> None:
    config, tensors = import_hf(folder)
    golden_config, golden_tensors = import_hf(golden)
    assert config == golden_config
    assert tensors.keys() == golden_tensors.keys()
    assert all(torch.equal(tensors[name], golden_tensors[name]) for name in tensors)


def test_golden_config(golden: Path) -> None:
    config, _ = import_hf(golden)
    assert (config.vocab_size, config.d_model, config.num_layers) == (128, 128, 2)
    assert config.blocks["mlstm"].ffn.d_ff == 256
    assert config.num_params() == 363_408


def test_keys_of_the_released_model(golden: Path, tmp_path: Path) -> None:
    old = {
        "hidden_size": None,
        "num_hidden_layers": None,
        "head_dim": 32,
        "forward_backend_name": "chunkwise--triton_limit_chunk",
        "igate_bias_init_range": -10,
        "cell_norm_eps": 1e-6,
        "add_qk_norm": False,
        "force_bos_token_insert": True,
        "torch_dtype": "float32",
    }
    assert_same_model(write_folder(tmp_path, golden, old, {}), golden)


def test_size_of_the_released_model() -> None:
    released = {
        "embedding_dim": 4096,
        "num_blocks": 32,
        "num_heads": 8,
        "vocab_size": 50304,
        "ffn_proj_factor": 2.667,
    }
    config = target_for_import("xlstm", "").import_config(released)
    assert config.num_params() == 6_865_424_896
    ours = load_config("xlstm_7b.yaml").model
    assert config.blocks["mlstm"].ffn == ours.blocks["mlstm"].ffn
    shape = {"d_model", "num_layers", "vocab_size", "pattern", "norm", "head"}
    assert config.model_dump(include=shape) == ours.model_dump(include=shape)


def test_names_of_the_standalone_package(golden: Path, tmp_path: Path) -> None:
    embedding = load_file(golden / "model.safetensors")["backbone.embeddings.weight"]
    renamed = {"backbone.embeddings.weight": None, "embedding.weight": embedding}
    assert_same_model(write_folder(tmp_path, golden, {}, renamed), golden)


def test_fused_weights(golden: Path, tmp_path: Path) -> None:
    single = load_file(golden / "model.safetensors")
    fused: dict[str, Any] = {}
    for i in range(2):
        for prefix, name, parts, leaves in (
            ("mlstm_layer", "qkv_opreact", ("q", "k", "v", "ogate_preact"), ("weight",)),
            ("mlstm_layer", "ifgate_preact", ("igate_preact", "fgate_preact"), ("weight", "bias")),
            ("ffn", "proj_up_gate_z", ("proj_up_gate", "proj_up"), ("weight",)),
        ):
            for leaf in leaves:
                names = [f"backbone.blocks.{i}.{prefix}.{part}.{leaf}" for part in parts]
                whole = torch.cat([single[name] for name in names])
                fused |= dict.fromkeys(names) | {
                    f"backbone.blocks.{i}.{prefix}.{name}.{leaf}": whole
                }
    folder = write_folder(tmp_path, golden, {"weight_mode": "fused"}, fused)
    assert_same_model(folder, golden)


def test_sharded_by_another_tool(golden: Path, tmp_path: Path) -> None:
    tensors = load_file(golden / "model.safetensors")
    weight_map = {name: f"part{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text((golden / "config.json").read_text())
    assert_same_model(tmp_path, golden)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="expected a mapping weight_map"):
        import_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "part1.safetensors").unlink()
    with pytest.raises(UserError, match="part1.safetensors: cannot be read"):
        import_hf(tmp_path)


def test_every_unknown_option_is_named(golden: Path, tmp_path: Path) -> None:
    options = {"use_bias": True, "add_out_norm": False, "add_qk_norm": True, "eps": 1e-5}
    with pytest.raises(UserError) as caught:
        import_hf(write_folder(tmp_path, golden, options, {}))
    assert len(caught.value.lines) == len(options)
    for key, value in options.items():
        assert any(f"config.json: {key}={value}" in line for line in caught.value.lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type=gpt2: expected one of .*, mamba2, .*, xlstm"),
        ({"embedding_dim": 256}, "hidden_size=128 and embedding_dim=256 differ"),
        ({"hidden_size": None, "embedding_dim": None}, "hidden_size"),
        ({"num_heads": 3}, "num_heads=3 does not divide"),
        ({"num_heads": "four"}, "num_heads='four'"),
        ({"weight_mode": "other"}, "weight_mode='other'"),
    ],
)
def test_bad_config(golden: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_hf(write_folder(tmp_path, golden, changes, {}))


def test_tensors_that_do_not_fit_are_named(golden: Path, tmp_path: Path) -> None:
    changes = {
        "backbone.out_norm.weight": None,
        "backbone.extra": torch.zeros(3),
        "lm_head.weight": torch.zeros(100, 128),
    }
    with pytest.raises(UserError) as caught:
        import_hf(write_folder(tmp_path, golden, {}, changes))
    assert [line.partition(": ")[2] for line in caught.value.lines] == [
        "head.weight: shape [100, 128], expected [128, 128]",
        "norm.weight: missing",
        "backbone.extra: not in this model",
        "3 tensors differ: these are of another model",
    ]


def test_damaged_files(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.json: cannot be read as JSON"):
        import_hf(tmp_path)
    folder = write_folder(tmp_path, golden, {}, {})
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="model.safetensors: cannot be read as safetensors"):
        import_hf(folder)
    weights.unlink()
    with pytest.raises(UserError, match="model.safetensors: cannot be read as safetensors"):
        import_hf(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object, got list"):
        import_hf(folder)
