"""The first steps of an engine are slower: kernels are loaded, tuned and cached. Data plane."""

from __future__ import annotations

import math
from dataclasses import replace

from lab.control.plan import TERMS, Decoding, StepPlan, StepTiming
from sim.cost.model import CostModel


class WithWarmup:
    """A cost model whose step n takes 1 + `share` * exp(-n / `steps`) times as long; one for each replica."""

    def __init__(self, cost: CostModel, share: float, steps: float) -> None:
        self._cost, self._share, self._steps = cost, share, steps
        self._index = 0
        """Of the step asked for next, when nobody says it: steps that are crossed at once come one by one."""
        self._decode_time = getattr(cost, "decode_time", None)
        if self._decode_time is not None:
            self.decode_time = self._slow_decode_time

    def another(self, replica: int) -> WithWarmup:
        return WithWarmup(self._cost, self._share, self._steps)

    def step_time(self, plan: StepPlan) -> StepTiming:
        self._index = plan.index + 1
        return self._slower(self._cost.step_time(plan), plan.index)

    def _slow_decode_time(self, decodes: Decoding) -> StepTiming:
        assert self._decode_time is not None
        index, self._index = self._index, self._index + 1
        return self._slower(self._decode_time(decodes), index)

    def _slower(self, timing: StepTiming, index: int) -> StepTiming:
        factor = 1 + self._share * math.exp(-index / self._steps)
        return replace(
            timing,
            prepare_ns=round(timing.prepare_ns * factor),
            forward_ns=round(timing.forward_ns * factor),
            sample_ns=round(timing.sample_ns * factor),
            terms=tuple(
                [
                    value if name == "transfer" else round(value * factor)
                    for name, value in zip(TERMS, timing.terms, strict=False)
                ]
            ),
        )
