"""Ranks are processes: one thread each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.threads import one_thread as one_thread


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")
