"""The skew of a rank's clock is bounded by the exchanges of a run, and the true one always lies within."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.analysis.clocks import say, skews

MS = 1_000_000


def run_of(skew: list[int], ways: list[tuple[int, int]]) -> Any:
    """A run whose rank 1 has a clock that is `skew` ahead in each step; `ways` are how long plan and answer took."""
    rows = [
        [{"rank": 0, "down_ns": 0, "up_ns": 0}, {"rank": 1, "down_ns": down + ahead, "up_ns": up - ahead}]
        for ahead, (down, up) in zip(skew, ways, strict=True)
    ]
    return SimpleNamespace(steps=pd.DataFrame({"ranks": rows}), config={}, partial=None)


ways = st.lists(st.tuples(st.integers(1, 50 * MS), st.integers(1, 50 * MS)), min_size=1, max_size=30)


@given(ahead=st.integers(-(10**10), 10**10), ways=ways)
def test_the_truth_lies_within_and_no_closer_bound_is_missed(ahead: int, ways: list[tuple[int, int]]) -> None:
    [found] = skews(run_of([ahead] * len(ways), ways))
    assert found.low <= ahead <= found.high
    assert found.high - found.low == min(down for down, _ in ways) + min(up for _, up in ways)
    assert not found.drifts
    if found.wrong:
        assert ahead != 0
        assert f"{abs(found.ahead_ns) / 1e6:.3f} ms {'ahead of' if ahead > 0 else 'behind'}" in say(found)


@given(ways=ways)
def test_right_clocks_are_never_blamed(ways: list[tuple[int, int]]) -> None:
    [found] = skews(run_of([0] * len(ways), ways))
    assert not found.wrong


@pytest.mark.parametrize("slope", [5, -5])
def test_a_clock_of_another_speed_is_told_from_a_constant_skew(slope: int) -> None:
    [found] = skews(run_of([slope * MS * step for step in range(10)], [(MS, MS)] * 10))
    assert found.drifts
    assert found.wrong
    assert "moves by 43.000 ms at least" in say(found)


def test_one_process_has_one_clock() -> None:
    run = SimpleNamespace(steps=pd.DataFrame({"ranks": [[], None]}), config={}, partial=None)
    assert skews(run) == []
