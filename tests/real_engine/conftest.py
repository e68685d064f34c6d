"""One thread for these tests: models this small gain nothing from a second, and spinning threads of two test
processes on few cores slow each other tenfold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from real_engine.native import library
from real_engine.native.library import Kernels


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    said: list[str] = []
    found = library.load(tmp_path_factory.mktemp("kernels"), said.append)
    if found is None:
        pytest.skip(" ".join(said))
    return found
