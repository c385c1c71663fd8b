"""The tiny golden Huginn in the layout of its release, and what the released code computes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden/recurrent_depth"
WEIGHTS = "model.safetensors"
LOGITS = {1: 3e-5, 4: 5e-5, 8: 1e-4}
"""Number of recurrences -> absolute tolerance of logits."""


def released(folder: Path, **changes: Any) -> Path:
    """Write the golden model as its release would; keys of config.json change, None removes one."""
    folder.mkdir(exist_ok=True)
    config = json.loads((GOLDEN / "a_121.config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    shutil.copyfile(GOLDEN / "a_121.safetensors", folder / WEIGHTS)
    return folder


def golden_tensors() -> dict[str, torch.Tensor]:
    """Return the weights under their released names."""
    return load_file(GOLDEN / "a_121.safetensors")


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Replace tensors of a folder, by name; None removes one."""
    tensors = load_file(folder / WEIGHTS) | changes
    kept = {name: x.contiguous() for name, x in tensors.items() if x is not None}
    save_file(kept, folder / WEIGHTS)
    return folder


def golden_arrays() -> dict[str, torch.Tensor]:
    """Return inputs and results."""
    with numpy.load(GOLDEN / "a_121.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}
