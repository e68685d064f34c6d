from __future__ import annotations

from pathlib import Path

import pytest

from real_engine.models.loading import LoadedModel, load_model
from real_engine.models.spec import ModelSpec


@pytest.fixture(scope="session")
def tiny() -> LoadedModel:
    return load_model(ModelSpec("tiny", "float32"), cache_dir=Path("unused"))
