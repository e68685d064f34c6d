"""Whose clock is wrong: what plans and answers between ranks say of the ranks' clocks. Observation path.

A message can't come before it was sent. Of each step rank 0 keeps when it sent the plan and when it took the answer,
by its own clock, and each rank when the plan came and when it gave the answer, by its. If a rank's clock is `x` ahead
of rank 0's, then `down` (came - sent) is the way there plus x, and `up` (taken - given) the way back less x; both
ways take some time, so -up <= x <= down. The tightest of a run's steps bound x on both sides: the argument of the
Network Time Protocol (RFC 5905), over as many exchanges as there were steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from lab.analysis.frames import RunLike, table_of

if TYPE_CHECKING:
    import pandas as pd


class Skew(NamedTuple):
    """How far one rank's clock is ahead of rank 0's, nanoseconds: somewhere in `low .. high`."""

    rank: int
    low: int
    high: int
    steps: int

    @property
    def ahead_ns(self) -> float:
        """The middle of what is possible; negative for a clock that is behind."""
        return (self.low + self.high) / 2

    @property
    def within_ns(self) -> float:
        """How far it may be from that."""
        return abs(self.high - self.low) / 2

    @property
    def drifts(self) -> bool:
        """No one number fits all steps: the clock was set, or runs at another speed."""
        return self.low > self.high

    @property
    def wrong(self) -> bool:
        """Whether the two clocks can't agree."""
        return self.drifts or not self.low <= 0 <= self.high


def skews(run: RunLike) -> list[Skew]:
    """One a rank but the first; empty where one process computed, or a run doesn't tell."""
    bounds: dict[int, tuple[int, int, int]] = {}
    for rank, down, up in _exchanges(table_of(run, "steps", ["ranks"])):
        low, high, steps = bounds.get(rank, (-up, down, 0))
        bounds[rank] = (max(low, -up), min(high, down), steps + 1)
    return [Skew(rank, *found) for rank, found in sorted(bounds.items())]


def _exchanges(steps: pd.DataFrame) -> Iterator[tuple[int, int, int]]:
    if "ranks" not in steps:
        return
    for ranks in steps["ranks"]:
        for part in [] if ranks is None else ranks:
            if part["rank"] and (part.get("down_ns") or part.get("up_ns")):
                yield int(part["rank"]), int(part["down_ns"]), int(part["up_ns"])


def say(skew: Skew) -> str:
    """`rank 1's clock is 5.012 ms ahead of rank 0's (within 0.041 ms, 96 steps)`."""
    size = abs(skew.ahead_ns) / 1e6
    way = "ahead of" if skew.ahead_ns > 0 else "behind"
    if skew.drifts:
        return (
            f"rank {skew.rank}'s clock doesn't keep its distance from rank 0's: it moves by "
            f"{skew.within_ns * 2 / 1e6:.3f} ms at least ({skew.steps} steps)"
        )
    return (
        f"rank {skew.rank}'s clock is {size:.3f} ms {way} rank 0's (within {skew.within_ns / 1e6:.3f} ms, "
        f"{skew.steps} steps)"
    )
