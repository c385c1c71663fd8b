"""The golden model, for all conversion tests, and a place for the code that exports carry."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden/xlstm"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of a tiny model in Hugging Face format."""
    return GOLDEN / "tiny128"


@pytest.fixture(scope="session")
def arrays() -> dict[str, Any]:
    """What transformers and a float64 reference compute with that model."""
    import numpy

    with numpy.load(GOLDEN / "golden_tiny128.npz") as file:
        return {
            name: torch.from_numpy(file[name]) if file[name].dtype.kind != "U" else file[name]
            for name in file.files
        }


@pytest.fixture(scope="module", autouse=True)
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the copies that transformers makes of the files it runs out of the user's cache."""
    folder = tmp_path_factory.mktemp("code")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        patch.setattr(sys, "path", list(sys.path))
        yield folder
