"""Measured times as functions: straight lines between the points, a law of physics beyond them. Data plane."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence

Law = Callable[[float], float]
"""Says how a time grows: only ratios of its values are used."""


class Curve:
    """Time against one size. Never less for more, and never below `floor`, which bounds every point.

    Lines between points were measured to be better than in log space. Beyond the last point the time grows as
    `floor` does; before the first it stays.
    """

    def __init__(self, points: Mapping[float, float], floor: Law) -> None:
        if not points:
            raise ValueError("a curve needs at least one point")
        self.xs = sorted(points)
        self.ys: list[float] = []
        least = 0.0
        for x in self.xs:
            least = max(least, points[x], floor(x))
            self.ys.append(least)
        self._floor = floor
        self._last = floor(self.xs[-1])

    @property
    def end(self) -> float:
        """The largest size that was measured."""
        return self.xs[-1]

    def __call__(self, x: float) -> float:
        xs, ys = self.xs, self.ys
        if x >= xs[-1]:
            if x == xs[-1] or self._last <= 0:
                return ys[-1]
            return max(ys[-1] * self._floor(x) / self._last, ys[-1])
        if x <= xs[0]:
            return ys[0]
        at = bisect.bisect_right(xs, x)
        left, right = xs[at - 1], xs[at]
        share = (x - left) / (right - left)
        return ys[at - 1] + share * (ys[at] - ys[at - 1])

    def convex(self) -> Curve:
        """The same through slopes that never fall: neighbours whose slopes do share them (pool adjacent violators).

        Attention's work grows with the square of a prompt; a kernel that is a little better at one size isn't
        cheaper for more context.
        """
        runs: list[tuple[float, float]] = []  # (width, slope), those of equal slope as one
        for left, right in itertools.pairwise(zip(self.xs, self.ys, strict=True)):
            width, rise = right[0] - left[0], right[1] - left[1]
            while runs and runs[-1][1] * width > rise:
                more, slope = runs.pop()
                width, rise = width + more, rise + slope * more
            runs.append((width, rise / width))
        points = {self.xs[0]: self.ys[0]}
        x, y = self.xs[0], self.ys[0]
        for width, slope in runs:
            points |= {at: y + slope * (at - x) for at in self.xs if x < at <= x + width}
            x, y = x + width, y + slope * width
        return Curve(points, self._floor)


class Surface:
    """Time against two sizes: a curve in the second for each measured value of the first, and lines between them.

    `floor(first, second)` bounds it from below and says how it grows beyond what was measured.
    """

    def __init__(
        self, points: Mapping[tuple[float, float], float], floor: Callable[[float, float], float]
    ) -> None:
        self._floor = floor
        self.firsts = sorted({first for first, _ in points})
        self._curves: list[Curve] = []
        for first in self.firsts:
            row = {second: took for (one, second), took in points.items() if one == first}
            self._curves.append(Curve(row, lambda second, first=first: floor(first, second)))  # type: ignore[misc]

    def covers(self, first: float, second: float) -> bool:
        """Whether the measured points surround it."""
        if first > self.firsts[-1]:
            return False
        at = bisect.bisect_left(self.firsts, first)
        return second <= self._curves[at].end

    def __call__(self, first: float, second: float) -> float:
        firsts, curves = self.firsts, self._curves
        if first >= firsts[-1]:
            took = curves[-1](second)
            grown = self._floor(first, second) / max(self._floor(firsts[-1], second), 1e-30)
            return took * max(grown, 1.0)
        at = max(bisect.bisect_right(firsts, first), 1)
        left, right = firsts[at - 1], firsts[at]
        share = max(0.0, (first - left) / (right - left))
        low = curves[at - 1](second)
        took = low + share * (max(curves[at](second), low) - low)
        return max(took, self._floor(first, second))


def blend(values: Sequence[tuple[float, float]], x: float) -> float:
    """Linear interpolation in (x, y) pairs in order of x; the nearest value outside of them."""
    if x <= values[0][0]:
        return values[0][1]
    for (left, low), (right, high) in itertools.pairwise(values):
        if x <= right:
            return low + (x - left) / (right - left) * (high - low)
    return values[-1][1]
