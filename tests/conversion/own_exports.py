"""Exports that carry a modeling file: to load, to edit, and prompts to pad."""

import json
from pathlib import Path
from typing import Any

import torch
from conversion.with_transformers import load_with_transformers

PROMPTS = [[5, 1, 250, 3, 77, 0, 9], [42], [256, 7, 7]]
LONGEST = max(map(len, PROMPTS))


def padded(left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prompts, padded with a token that means something, and their mask."""
    ids, mask = [], []
    for prompt in PROMPTS:
        padding = [3] * (LONGEST - len(prompt))
        ids.append(padding + prompt if left else prompt + padding)
        ones, zeros = [1] * len(prompt), [0] * len(padding)
        mask.append(zeros + ones if left else ones + zeros)
    return torch.tensor(ids), torch.tensor(mask)


def load_trusted(folder: Path, **options: Any) -> Any:
    return load_with_transformers(folder, trust_remote_code=True, **options)


def edited(export: Path, folder: Path, **changes: Any) -> Path:
    """Copy an export, and change its config.json; None removes a key."""
    folder.mkdir()
    for path in export.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder
