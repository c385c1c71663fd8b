"""Tensors round trip in one process, and a wrong checkpoint is refused before anything changes."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from megarec.checkpoint import dcp
from megarec.errors import UserError


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def test_round_trip_keeps_every_bit_and_dtype(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "f32": torch.randn(3, 5, generator=generator),
        "f64": torch.randn(2, generator=generator, dtype=torch.float64),
        "bf16": torch.randn(4, generator=generator).bfloat16(),
        "i64": torch.tensor([2**62, -1]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(float("nan")),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(3, 2, generator=generator).T,
    }
    dcp.write(tmp_path, tensors)
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.read(tmp_path, read)
    for name, tensor in tensors.items():
        assert torch.equal(bits(read[name]), bits(tensor))
    assert dcp.describe(tmp_path) == {n: (t.shape, t.dtype) for n, t in tensors.items()}
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_another_model_is_refused_with_ten_lines_and_nothing_changes(tmp_path: Path):
    dcp.write(tmp_path, dcp.model_tensors(nn.Sequential(*(nn.Linear(2, 2) for _ in range(8)))))
    model = nn.Sequential(*(nn.Linear(2, 3) for _ in range(9)))
    tensors = dcp.model_tensors(model)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(UserError) as caught:
        dcp.read(tmp_path, tensors)
    assert len(caught.value.lines) == 11
    expected = "model.0.bias: shape [2], expected [3]"
    assert caught.value.lines[0].endswith(expected)
    assert "18 tensors differ" in caught.value.lines[-1]
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_missing_and_extra_names_are_told_apart(tmp_path: Path):
    dcp.write(tmp_path, {"a": torch.ones(1), "old": torch.ones(1)})
    kept = torch.zeros(1)
    with pytest.raises(UserError) as caught:
        dcp.read(tmp_path, {"a": kept, "new": torch.zeros(1)})
    assert "new: missing" in caught.value.lines[0]
    assert "old: not in this model" in caught.value.lines[1]
    assert kept.item() == 0
    dcp.read(tmp_path, {"a": kept}, partial=True)
    assert kept.item() == 1
    with pytest.raises(UserError, match="new: missing"):
        dcp.read(tmp_path, {"new": kept}, partial=True)


class Touch:
    """What a hostile checkpoint holds: reading it with pickle creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.open, (self.marker, os.O_CREAT)


def test_a_pickle_in_place_of_a_shard_is_refused_and_not_run(tmp_path: Path):
    folder = tmp_path / "step"
    folder.mkdir()
    dcp.write(folder, {"a": torch.ones(1)})
    (shard,) = folder.iterdir()
    marker = tmp_path / "marker"
    shard.write_bytes(pickle.dumps(Touch(marker)))
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        dcp.read(folder, {"a": torch.zeros(1)})
    assert not marker.exists()


def test_a_missing_folder_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere"):
        dcp.read(tmp_path / "nowhere", {"a": torch.zeros(1)})


def test_tied_and_frozen_parameters(tmp_path: Path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tensors = dcp.training_tensors(model, optimizer)
    dcp.write(tmp_path, tensors)
    dcp.read(tmp_path, tensors)
    assert sorted(name for name in tensors if name.startswith("model.")) == [
        "model.0.bias",
        "model.0.weight",
        "model.1.bias",
    ]
    assert tensors["optimizer.0.weight.step"] == 1
    assert tensors["optimizer.0.bias.step"] == 0
