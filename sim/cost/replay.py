"""Replay: the durations of a recorded run drive the simulation.

While the decisions are the recorded ones (equal digests), each step takes exactly what it took. After a
divergence there is no recorded duration for a step, so the recorded step of the most similar shape lends its
own. The first step where that happens is `diverged_at`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.control.plan import StepPlan, StepTiming
from lab.errors import ReplayError


class RecordedCost:
    """Durations by step. `shapes` are (prefill tokens, decode tokens, context tokens) of the recorded steps."""

    def __init__(
        self,
        digests: Sequence[str],
        timings: Sequence[StepTiming],
        shapes: Sequence[tuple[int, int, int]] | NDArray[Any],
    ) -> None:
        if not digests:
            raise ReplayError("the recorded run has no steps to replay")
        self._timings = timings
        self._recorded = {digest: index for index, digest in enumerate(digests)}
        self._shapes = np.log1p(np.asarray(shapes, dtype=np.float64).T)  # [3, steps]
        self._found: dict[tuple[int, int, int], int] = {}
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
        shape = prefill, decode, context
        if shape not in self._found:
            here = np.log1p(shape)
            distance = sum((column - value) ** 2 for column, value in zip(self._shapes, here, strict=True))
            self._found[shape] = int(np.argmin(distance))
        return self._found[shape]
