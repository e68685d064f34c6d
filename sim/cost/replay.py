"""Replay: the durations of a recorded run drive the simulation.

While the decisions are the recorded ones (equal digests), each step takes exactly what it took. After a
divergence there is no recorded duration for a step, so the recorded step of the most similar shape lends its
own. The first step where that happens is `diverged_at`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lab.control.plan import StepPlan, StepTiming
from lab.errors import ReplayError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class RecordedCost:
    """Durations by step. `shapes` are (prefill tokens, decode tokens, context tokens) of the recorded steps."""

    def __init__(
        self, digests: Sequence[str], timings: Sequence[StepTiming], shapes: Sequence[tuple[int, int, int]]
    ) -> None:
        if not digests:
            raise ReplayError("the recorded run has no steps to replay")
        self._timings = timings
        self._recorded = {digest: index for index, digest in enumerate(digests)}
        self._shapes = shapes
        self._near: Nearest | None = None
        self.diverged_at: int | None = None

    def step_time(self, plan: StepPlan) -> StepTiming:
        index = self._recorded.get(plan.digest)
        if index is not None:
            return self._timings[index]
        if self.diverged_at is None:
            self.diverged_at = plan.index
        return self._timings[self._nearest(plan)]

    def parity(self, steps: int) -> bool:
        """Whether a run of so many steps took exactly the recorded decisions."""
        return self.diverged_at is None and steps == len(self._recorded)

    def _nearest(self, plan: StepPlan) -> int:
        """The recorded step of least distance in log space; the earliest among equals."""
        steady, items = plan.decodes, plan.items
        prefill = sum(work.tokens for work in items if work.tokens > 1)
        decode = steady.seqs + sum(work.tokens for work in items if work.tokens == 1)
        context = steady.context + sum(work.context for work in items)
        if self._near is None:
            self._near = Nearest(self._shapes)
        return self._near(prefill, decode, context)


class Nearest:
    """Which recorded step is nearest to a shape: what a look at all of them would find, in logarithmic time."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        from scipy.spatial import KDTree

        self._first: dict[tuple[int, int, int], int] = {}
        for index, shape in enumerate(shapes):
            self._first.setdefault(shape, index)
        self._index: list[int] = list(self._first.values())
        """Of each different shape, the earliest step: ascending."""
        self._points: NDArray[np.float64] = np.log1p(
            np.array(list(self._first), dtype=np.float64)
        )  # [shapes, 3]
        self._tree: Any = KDTree(self._points)

    def __call__(self, prefill: int, decode: int, context: int) -> int:
        known = self._first.get((prefill, decode, context))
        if known is not None:
            return known
        here = np.log1p([prefill, decode, context])
        (least, second), (place, _) = self._tree.query(here, k=2)
        if second > least * (1 + 1e-9):
            return int(self._index[place])
        near = np.sort(self._tree.query_ball_point(here, least * (1 + 1e-9)))
        distance = ((self._points[near] - here) ** 2).sum(axis=1)
        return self._index[int(near[np.argmin(distance)])]
