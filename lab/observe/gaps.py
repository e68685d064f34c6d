"""Gaps between the tokens of many requests, by how often each occurred. Observation path.

Requests that decode together share their gaps: of a stretch of their clock (`lab.control.token_times`) it is enough to
know from where to where each went along. So it costs steps and requests, not tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lab.control.token_times import TokenTimes


def counted_gaps(times: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """(gaps, how often each was there), arrays of int64; the same gap may come several times."""
    import numpy as np

    alone: list[int] = []
    clocks: dict[int, tuple[list[int], list[int], list[int]]] = {}
    for each in times:
        if type(each) is not TokenTimes:  # compiled, it takes every sequence for an instance of itself
            alone += [later - earlier for earlier, later in pairwise(each)]
            continue
        own, stretches = each.split()
        alone += own
        for clock, first, end in stretches:
            _, firsts, ends = clocks.setdefault(id(clock), (clock, [], []))
            firsts.append(first)
            ends.append(end)
    gaps, counts = np.unique(np.array(alone, dtype=np.int64), return_counts=True)
    found, often = [gaps], [counts]
    for clock, firsts, ends in clocks.values():
        low, high = min(firsts), max(ends)
        # Gap n lies before instant n + 1; those from a stretch's first instant to its last are its own.
        begun = np.bincount(np.array(firsts) - low, minlength=high - low)
        over = np.bincount(np.array(ends) - 1 - low, minlength=high - low)
        along = np.cumsum(begun - over)[:-1]
        there = along > 0
        when = np.array(clock[low:high], dtype=np.int64)
        found.append((when[1:] - when[:-1])[there])
        often.append(along[there])
    return np.concatenate(found), np.concatenate(often)
