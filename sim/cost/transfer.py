"""What swapping costs: the plan's moves over the link between device and host. Data plane, state path."""

from __future__ import annotations

from dataclasses import replace

from lab.control.executor import Capacity
from lab.control.plan import TERMS, StepPlan, StepTiming
from sim.cost.model import CostModel

_TRANSFER = TERMS.index("transfer")


class WithTransfers:
    """A cost model and, before its step, the plan's moves at the capacity's nominal bandwidth.

    Out and in share the link one after another, and nothing is overlapped with the forward. Copies within the
    device are counted like moves: no less than they cost.
    """

    def __init__(self, cost: CostModel, capacity: Capacity) -> None:
        self._cost, self._capacity = cost, capacity
        decode_time = getattr(cost, "decode_time", None)
        if decode_time is not None:
            self.decode_time = decode_time  # they move nothing

    def step_time(self, plan: StepPlan) -> StepTiming:
        timing = self._cost.step_time(plan)
        if not (plan.swap_out or plan.swap_in or plan.copies):
            return timing
        took = self._capacity.transfer_ns(plan.moved_blocks + plan.copied_blocks)
        terms = timing.terms
        if terms:
            terms = (*terms[:_TRANSFER], took, *terms[_TRANSFER + 1 :])
        return replace(timing, transfer_ns=took, terms=terms)
