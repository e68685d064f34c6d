"""Whole numbers as texts: looked up or not, they are what Python writes."""

from __future__ import annotations

import numpy as np
import pytest

from lab.observe.bulk import functions


@pytest.mark.parametrize("numbers", [[], [0, 4095, 7], [4095, 4096], [-1, 3], [1 << 62, -(1 << 62)]])
def test_numbers_are_written_as_python_does(numbers: list[int]) -> None:
    written = functions.written(np.array(numbers, dtype=np.int64))
    assert written.to_pylist() == [str(number) for number in numbers]
