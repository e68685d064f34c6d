"""Times that are kept as stretches of a shared clock are the times; gaps counted by stretch are the gaps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.control.token_times import TokenTimes
from lab.observe.gaps import counted_gaps

Moves = list[tuple[bool, int]]
moves = st.lists(st.tuples(st.booleans(), st.integers(1, 5)), max_size=8)


def lives(
    gaps: Sequence[int], taken: Sequence[Moves], restart: int
) -> list[tuple[TokenTimes, tuple[int, ...]]]:
    """Requests that follow one clock, or go their own way; in the middle another stretch of the clock begins."""
    clock = list(accumulate(gaps, initial=7))
    halves = (clock[:restart], clock[restart:])
    found = []
    for own in taken:
        times, plain, at = TokenTimes(), list[int](), 0
        for alone, count in own:
            for n in range(at, min(at + count, len(clock))):
                half, place = (halves[0], n) if n < restart else (halves[1], n - restart)
                if alone:
                    times.append(clock[n])
                else:
                    times.share(half, place, place + 1)
                plain.append(clock[n])
            at += count
        found.append((times, tuple(plain)))
    return found


@given(st.lists(st.integers(0, 9), max_size=40), st.lists(moves, max_size=6), st.integers(0, 20))
def test_read_like_a_tuple_and_counted_like_one(gaps: list[int], taken: list[Moves], restart: int) -> None:
    found = lives(gaps, taken, restart)
    expected: Counter[int] = Counter()
    for times, plain in found:
        assert len(times) == len(plain)
        assert times == plain
        assert plain == times
        assert hash(times) == hash(plain)
        assert times.copy() == times
        assert list(times) == [times[n] for n in range(len(times))]
        assert [times[-n - 1] for n in range(len(times))] == list(reversed(plain))
        assert times[1:] == plain[1:]
        with pytest.raises(IndexError):
            times[len(plain)]
        expected.update(later - earlier for earlier, later in pairwise(plain))
    for given_ in ([times for times, _ in found], [plain for _, plain in found]):
        values, counts = counted_gaps(given_)
        counted: Counter[int] = Counter()
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            assert count > 0
            counted[value] += count
        assert counted == expected


def test_a_stretch_that_goes_on_is_one_and_a_copy_goes_its_own_way() -> None:
    clock = list(range(100, 200))
    times = TokenTimes()
    times.append(50)
    for n in range(100):
        times.share(clock, n, n + 1)
    _, stretches = times.split()
    assert [stretch[1:] for stretch in stretches] == [(0, 100)]
    apart = TokenTimes()
    apart.share(clock, 0, 3)
    apart.append(150)
    apart.share(clock, 3, 5)
    assert apart == (100, 101, 102, 150, 103, 104)
    other = times.copy()
    other.append(300)
    assert (len(times), len(other), times[-1], other[-1]) == (101, 102, 199, 300)


def test_gaps_of_a_clock_that_nobody_went_along_are_not_counted() -> None:
    clock, early, late = [0, 1, 3, 6, 10, 15], TokenTimes(), TokenTimes()
    early.share(clock, 0, 2)
    late.share(clock, 4, 6)
    values, counts = counted_gaps([early, late])
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {1: 1, 5: 1}
