from __future__ import annotations

from pathlib import Path

import pytest

from holdover_world.model.transformer import WorldModel
from tests.holdover_world.driving import world_model, write_clips


@pytest.fixture(scope="session")
def model() -> WorldModel:
    return world_model()


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One clip of each kind: 8 latent frames of start, then 16 more."""
    return write_clips(tmp_path_factory.mktemp("clips"), 4 * (8 + 16))
