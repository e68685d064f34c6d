"""Models this small run on one thread."""

from __future__ import annotations

import pytest

from real_engine.native import library
from real_engine.native.library import Kernels
from tests.threads import one_thread as one_thread


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    said: list[str] = []
    found = library.load(tmp_path_factory.mktemp("kernels"), said.append)
    if found is None:
        pytest.skip(" ".join(said))
    return found
