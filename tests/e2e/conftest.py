"""One folder with prepared data, for all tests that run real commands."""

import pytest
from commands import Commands


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """Commands in a folder whose name has a space."""
    return Commands(tmp_path_factory.mktemp("main path"))
