"""Weights load from runs, step folders and Hugging Face folders, into whole and sharded models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conversion.tiny_models import (
    assert_same_weights,
    random_model,
    run_config,
    tiny_config,
    write_run,
)

from megarec.conversion import export_hf, load_initial_weights, load_model
from megarec.errors import UserError
from megarec.models import build_model
from megarec.parallel.apply import build_sharded_model
from megarec.parallel.mesh import build_mesh
from megarec.testing.distributed import run_ranks


@pytest.mark.parametrize("tie", [False, True])
def test_run_and_step_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tie: bool) -> None:
    expected = random_model(tiny_config(head={"soft_cap": 30.0, "tie_embeddings": tie}))
    run = write_run(tmp_path / "run", expected)
    monkeypatch.chdir(run / "checkpoints")
    for path in (run, run / "checkpoints/step_00000010", Path("step_00000010")):
        model, config = load_model(path)
        assert_same_weights(model, expected)
        assert config == run_config(expected.config)
        assert not model.training and all(p.requires_grad for p in model.parameters())


def test_hf_folder(tmp_path: Path) -> None:
    expected = random_model(tiny_config())
    export_hf(expected, tmp_path / "out")
    model, config = load_model(tmp_path / "out")
    assert config is None
    assert_same_weights(model, expected)


def test_bfloat16_exports_load_in_float32(tmp_path: Path) -> None:
    half = random_model(tiny_config()).bfloat16()
    export_hf(half, tmp_path / "out")
    model, _ = load_model(tmp_path / "out")
    assert model.embedding.weight.dtype == torch.float32
    assert_same_weights(model, half.float())


def test_initial_weights_of_another_model_change_nothing(tmp_path: Path) -> None:
    other = random_model(tiny_config(d_model=192, num_layers=1))
    write_run(tmp_path / "run", other)
    export_hf(other, tmp_path / "out")
    model = build_model(tiny_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for path in (tmp_path / "run", tmp_path / "out"):
        with pytest.raises(UserError) as caught:
            load_initial_weights(model, path)
        assert len(caught.value.lines) == 11
        assert "tensors d" in caught.value.lines[-1]
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a run folder"):
        load_model(tmp_path)
    run = write_run(tmp_path / "run", random_model(tiny_config()))
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match="has neither config.yaml nor model.yaml"):
        load_model(run)
    (run / "model.yaml").write_text("model: {vocab_size: 320}")
    with pytest.raises(UserError, match="model.yaml: d_model"):
        load_model(run)


def load_sharded(rank: int, world_size: int, paths: list[str]) -> list[dict[str, Any]]:
    config = run_config(tiny_config())
    mesh = build_mesh(config.parallel, world_size, "cpu")
    loaded = []
    for path in paths:
        model = build_sharded_model(config, mesh, torch.device("cpu")).model
        load_initial_weights(model, Path(path))
        loaded.append({name: p.full_tensor() for name, p in model.state_dict().items()})
    return loaded


def test_sharded_models_take_their_shards(tmp_path: Path) -> None:
    expected = random_model(tiny_config())
    export_hf(expected, tmp_path / "out")
    run = write_run(tmp_path / "run", expected)
    for loaded in run_ranks(load_sharded, 2, [str(tmp_path / "out"), str(run)]):
        for tensors in loaded:
            assert tensors.keys() == expected.state_dict().keys()
            for name, tensor in expected.state_dict().items():
                assert torch.equal(tensors[name], tensor), name
