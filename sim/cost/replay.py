"""Replay: the durations of a recorded run drive the simulation.

While the decisions are the recorded ones (equal digests), each step takes exactly what it took, on the replica that
took it. After a divergence there is no recorded duration for a step, so the recorded step of the most similar shape
lends its own. The first step where that happens is `diverged_at`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lab.control.plan import StepPlan, StepTiming
from lab.errors import ReplayError

if TYPE_CHECKING:
    from numpy.typing import NDArray


_NONE: Mapping[str, int] = {}


class RecordedCost:
    """Durations by step. `shapes` are (prefill tokens, decode tokens, context tokens) of the recorded steps, `replicas`
    says who took each; none: one did. `cut`: of each replica, steps that its loss cut off, by digest; those lend
    nothing to others."""

    def __init__(
        self,
        digests: Sequence[str],
        timings: Sequence[StepTiming],
        shapes: Sequence[tuple[int, int, int]],
        replicas: Sequence[int] = (),
        cut: Mapping[int, Mapping[str, StepTiming]] | None = None,
    ) -> None:
        if not digests:
            raise ReplayError("the recorded run has no steps to replay")
        self._timings, self._shapes = timings, shapes
        self._replica, self._cut = 0, cut or {}
        self._recorded: dict[str, int] = {}
        self._by: dict[int, dict[str, int]] = {}
        """Steps by replica: two that began alike have steps of one digest, and may still be unlike devices."""
        for index, digest in enumerate(digests):
            self._recorded.setdefault(digest, index)
            self._by.setdefault(replicas[index] if replicas else 0, {})[digest] = index
        self._near: Nearest | None = None
        self.diverged_at: int | None = None

    def another(self, replica: int) -> RecordedCost:
        """The same for another replica, whose own steps come first."""
        other = copy.copy(self)
        other._replica, other.diverged_at = replica, None
        return other

    def step_time(self, plan: StepPlan) -> StepTiming:
        digest = plan.digest
        index = self._by.get(self._replica, _NONE).get(digest)
        if index is None:
            cut = self._cut.get(self._replica, {}).get(digest)
            if cut is not None:
                return cut
            index = self._recorded.get(digest)
        if index is not None:
            return self._timings[index]
        if self.diverged_at is None:
            self.diverged_at = plan.index
        return self._timings[self._nearest(plan)]

    def parity(self, steps: int) -> bool:
        """Whether a run of so many steps took exactly the recorded decisions."""
        return self.diverged_at is None and steps == len(self._timings)

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
