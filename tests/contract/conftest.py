"""The example mixers are registered while a test of this folder runs, and not else."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest

from megarec.config.mixer import MixerConfig

MixerConfig.discover()
with patch.dict(MixerConfig.members):
    from contract.minimal_gated_unit import MGUConfig
    from contract.retention import RetentionConfig


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    with patch.dict(MixerConfig.members, {"retention": RetentionConfig, "mgu": MGUConfig}):
        yield
